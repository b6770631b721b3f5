"""What one attention call computes: sizes, options and memory layout, without any array library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Layout = Literal["bhsd", "bshd"]
Causal = bool | Literal["bottom-right", "top-left"]
WindowSize = tuple[int | None, int | None] | None

MAX_HEAD_DIM = 256
MAX_SEQLEN = 2**30 - 256  # 32-bit sums of an index, a limit and a tile stay below 2**31

BLOCK_SIZE = 128
"""The queries, and the keys, of a block of a block mask, as in attention/block_mask.cuh."""

WORD_BITS = 32
"""The blocks in a word of its bits."""


def ceil_div(a: int, b: int) -> int:
    """The number of pieces of size b that cover a."""
    return -(-a // b)


class Operand(NamedTuple):
    """An array seen as (batch, heads, rows, columns), whatever its rank and layout; strides in elements.

    It is `aligned` if it begins at a multiple of 16 bytes.
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    dtype: str = ""
    aligned: bool = True

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        layout: Layout = "bhsd",
        dtype: str = "",
        aligned: bool = True,
    ) -> Operand:
        """View the 2-D to 4-D array of this shape and these strides (in elements) as an operand."""
        if layout == "bshd" and len(shape) > 2:
            shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
            strides = (*strides[:-3], strides[-2], strides[-3], strides[-1])
        missing = 4 - len(shape)
        return cls((1,) * missing + shape, (0,) * missing + strides, dtype, aligned)  # type: ignore[arg-type]

    def broadcast_batch(self, batch: int) -> Operand:
        """The same operand repeated along a batch axis of length 1, by a stride of 0."""
        return self.broadcast_to((batch, *self.shape[1:]))

    def broadcast_to(self, shape: tuple[int, int, int, int]) -> Operand:
        """The same operand repeated along axes of length 1, by strides of 0."""
        strides = tuple(
            stride if size == new else 0 for size, new, stride in zip(self.shape, shape, self.strides, strict=True)
        )
        return self._replace(shape=shape, strides=strides)  # type: ignore[arg-type]


class Band(NamedTuple):
    """Which keys a query sees: query ``i`` attends to key ``j`` iff ``i + begin <= j < i + end``."""

    begin: int
    end: int


class Window(NamedTuple):
    """A causal mask, its alignment and a sliding window: together a band around a diagonal.

    Query ``i`` of a sequence sees key ``j`` iff ``i + d + begin <= j < i + d + end``, where the diagonal ``d`` is
    ``seqlen_k - seqlen_q`` if `bottom_right`, and else 0.
    """

    begin: int = -MAX_SEQLEN
    end: int = MAX_SEQLEN
    bottom_right: bool = True

    @classmethod
    def of(cls, causal: Causal, window_size: WindowSize) -> Window:
        left, right = window_size if window_size is not None else (None, None)
        if causal:
            right = 0 if right is None else min(right, 0)
        return cls(
            begin=-MAX_SEQLEN if left is None else max(-left, -MAX_SEQLEN),
            end=MAX_SEQLEN if right is None else min(right + 1, MAX_SEQLEN),
            bottom_right=causal != "top-left",
        )

    def band(self, seqlen_q: int, seqlen_k: int) -> Band:
        """The band of a sequence, clamped to ``[-seqlen_q, seqlen_k]``, beyond which it makes no difference."""
        diagonal = seqlen_k - seqlen_q if self.bottom_right else 0

        def limit(offset: int) -> int:
            return max(-seqlen_q, min(diagonal + offset, seqlen_k))

        return Band(limit(self.begin), limit(self.end))


FULL = Window()


class Mod(NamedTuple):
    """A programmable score or mask: the CUDA C++ expressions or Python callables, and the kinds of their arguments.

    `args` holds (name, kind) in the order of the names, where the kind is "int", "float", "bool", or a dtype and a
    rank such as ("float32", 2) for an array.
    """

    score_mod: str | Callable[..., Any] | None = None
    mask_mod: str | Callable[..., Any] | None = None
    args: tuple[tuple[str, str | tuple[str, int]], ...] = ()


@dataclass(frozen=True)
class Problem:
    """One attention problem, after broadcasting: the sizes that every backend and every kernel works with.

    A packed problem has `batch` sequences whose lengths only the device knows; `seqlen_q` and `seqlen_k` are their
    sums. Arrays that change the scores (bias, mask, ...) are told by their operands.
    """

    dtype: str
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    window: Window = FULL
    packed: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    mod: Mod | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_heads_kv

    @property
    def band(self) -> Band:
        """Which keys a query sees, where all sequences have the same lengths."""
        return self.window.band(self.seqlen_q, self.seqlen_k)
