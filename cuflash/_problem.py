"""What one attention call computes: sizes, options and memory layout, without any array library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Layout = Literal["bhsd", "bshd"]
Causal = bool | Literal["bottom-right", "top-left"]
WindowSize = tuple[int | None, int | None] | None

MAX_HEAD_DIM = 256


def ceil_div(a: int, b: int) -> int:
    """The number of pieces of size b that cover a."""
    return -(-a // b)


class Operand(NamedTuple):
    """An array seen as (batch, heads, rows, columns), whatever its rank and layout; strides in elements."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], layout: Layout = "bhsd") -> Operand:
        """View the 2-D to 4-D array of this shape and these strides (in elements) as an operand."""
        if layout == "bshd" and len(shape) > 2:
            shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
            strides = (*strides[:-3], strides[-2], strides[-3], strides[-1])
        missing = 4 - len(shape)
        return cls((1,) * missing + shape, (0,) * missing + strides)  # type: ignore[arg-type]

    def broadcast_batch(self, batch: int) -> Operand:
        """The same operand repeated along a batch axis of length 1, by a stride of 0."""
        if self.shape[0] == batch:
            return self
        return Operand((batch, *self.shape[1:]), (0, *self.strides[1:]))


class Band(NamedTuple):
    """Which keys a query sees: query ``i`` attends to key ``j`` iff ``i + begin <= j < i + end``.

    Every combination of causal mask, alignment and sliding window is such a band around a diagonal.
    The limits are clamped to ``[-seqlen_q, seqlen_k]``, so that 32-bit sums of an index and a limit are safe.
    """

    begin: int
    end: int

    @classmethod
    def of(cls, seqlen_q: int, seqlen_k: int, causal: Causal, window_size: WindowSize) -> Band:
        left, right = window_size if window_size is not None else (None, None)
        if causal:
            right = 0 if right is None else min(right, 0)
        diagonal = 0 if causal == "top-left" else seqlen_k - seqlen_q

        def clamp(limit: int) -> int:
            return max(-seqlen_q, min(limit, seqlen_k))

        return cls(
            begin=-seqlen_q if left is None else clamp(diagonal - left),
            end=seqlen_k if right is None else clamp(diagonal + right + 1),
        )


@dataclass(frozen=True)
class Problem:
    """One attention problem, after broadcasting: the sizes that every backend and every kernel works with."""

    dtype: str
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    band: Band

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_heads_kv
