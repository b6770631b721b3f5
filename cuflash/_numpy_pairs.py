"""What the options of a call say about the pairs of queries and keys, for one block of scores at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._check_mods import read_only, returned
from ._dropout import kept_pairs
from ._dual import Dual
from ._problem import BLOCK_SIZE, Band, Problem, ceil_div

Array = NDArray[Any]
Scores = TypeVar("Scores", Array, Dual)
"""Scores alone, or with their derivatives."""


class Block(NamedTuple):
    """Some heads, queries and keys of a sequence."""

    heads: slice
    queries: slice
    keys: slice

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(1, heads, queries, keys)."""
        heads, queries, keys = (piece.stop - piece.start for piece in self)
        return 1, heads, queries, keys


@dataclass(frozen=True)
class Pairs:
    """The options of one sequence: batch entry `batch`, of the lengths in `problem`.

    All arrays are (batch, heads, queries, keys) of the whole call. Scores come and go with the query heads of a group
    stacked as rows, (heads_kv, group_size * queries, keys). Steps have the numbers of attention's docstring.
    """

    problem: Problem
    dtype: np.dtype[Any]
    batch: int
    bias: Array | None = None
    alibi_slopes: Array | None = None
    mask: Array | None = None
    block_mask: Any = None
    seed: int = 0

    @cached_property
    def band(self) -> Band:
        """Which keys a query sees."""
        return self.problem.band

    def capped(self, score: Scores) -> Scores:
        """Step 1, softcap."""
        cap = self.problem.softcap
        return score if cap is None else cap * np.tanh(score / cap)

    def modified(self, score: Scores, block: Block) -> Scores:
        """Steps 2 to 4: bias, ALiBi, score_mod. The scores given are used up."""
        mod = self.problem.mod
        score_mod = None if mod is None else mod.score_mod
        if self.bias is self.alibi_slopes is score_mod is None:
            return score
        stacked = score.shape
        score = score.reshape(block.shape)
        if self.bias is not None:
            score += self._piece(self.bias, *block).astype(self.dtype)
        if self.alibi_slopes is not None:
            score -= self._piece(self.alibi_slopes, *block) * self._distance(block)
        if callable(score_mod):
            score = self._mapped(score_mod, score, block)
        return score.reshape(stacked)

    def hidden(self, block: Block) -> Array | None:
        """Step 5: True where a pair is hidden, as (rows, keys) or (heads_kv, rows, keys); None if all are seen."""
        parts = list(self._visible(block))
        if not parts:
            return None
        visible = reduce(np.logical_and, parts)
        if visible.ndim == 2:
            return np.tile(~visible, (self.problem.group_size, 1))
        return self._stacked(~np.broadcast_to(visible, block.shape), block)

    def survivors(self, block: Block) -> Array | None:
        """Step 7: the factors of the weights, 0 or ``1 / (1 - dropout_p)``; None without dropout."""
        dropout_p = self.problem.dropout_p
        if dropout_p == 0:
            return None
        kept = kept_pairs(dropout_p, self.seed, self.batch, *block)
        return self._stacked(np.multiply(kept, 1 / (1 - dropout_p), dtype=self.dtype), block)

    def key_ranges(self, heads: slice, queries: slice) -> Iterator[tuple[int, int]]:
        """Yield the ranges of keys outside of which the band and the block mask hide everything."""
        begin, end = self.band
        first, last = max(0, queries.start + begin), min(self.problem.seqlen_k, queries.stop - 1 + end)
        if self.block_mask is None:
            yield first, last
            return
        blocks = slice(queries.start // BLOCK_SIZE, ceil_div(queries.stop, BLOCK_SIZE))
        visible = self._piece(self.block_mask.visible, heads, blocks, slice(None)).any(axis=(0, 1, 2))
        edges = np.flatnonzero(np.diff(visible, prepend=False, append=False))
        for start, stop in (edges.reshape(-1, 2) * BLOCK_SIZE).tolist():
            yield max(first, start), min(last, stop)

    def add_to(self, total: Array, gradient: Array, block: Block) -> None:
        """Add the gradient of scores to that of an array that was broadcast to them: ``total`` has size 1 there."""
        broadcast = tuple(axis for axis, size in enumerate(total.shape) if size == 1)
        piece = self._piece(total, *block)
        piece += gradient.reshape(block.shape).sum(axis=broadcast, keepdims=True)

    def _visible(self, block: Block) -> Iterator[Array]:
        """Yield what must all be True for a pair to be seen, each broadcasting to (1, heads, queries, keys)."""
        begin, end = self.band
        _, queries, keys = block
        if keys.start < queries.stop - 1 + begin or keys.stop > queries.start + end:
            i, j = np.arange(queries.start, queries.stop)[:, None], np.arange(keys.start, keys.stop)
            yield (j >= i + begin) & (j < i + end)
        full: Any = False
        if self.block_mask is not None:
            _, _, i, j = self._indices(block)
            some, full = (
                self._piece(x, block.heads, slice(None), slice(None))[:, :, i // BLOCK_SIZE, j // BLOCK_SIZE]
                for x in (self.block_mask.visible, self.block_mask.full)
            )
            if not some.all():
                yield some
            if (full | ~some).all():
                return
        if self.mask is not None:
            yield full | self._piece(self.mask, *block)
        mask_mod = None if self.problem.mod is None else self.problem.mod.mask_mod
        if callable(mask_mod):
            visible = mask_mod(None, *self._indices(block))
            yield full | _fitted("mask_mod", visible, block.shape).astype(bool)

    def _mapped(self, score_mod: Callable[..., Any], score: Scores, block: Block) -> Scores:
        """The scores that score_mod makes of these, in arrays of their own."""

        def own(x: Any) -> Array:
            return np.array(_fitted("score_mod", x, block.shape), self.dtype)

        mapped = score_mod(score, *self._indices(block))
        if not isinstance(score, Dual):
            return own(mapped)
        if not isinstance(mapped, Dual):  # the callable does not look at the score
            mapped = Dual(mapped, 0.0)
        slope = mapped.slope
        return Dual(own(mapped.value), float(slope) if np.ndim(slope) == 0 else own(slope))

    def _indices(self, block: Block) -> tuple[Array, ...]:
        """``b, h, q_idx, kv_idx`` as arrays that broadcast to (1, heads, queries, keys)."""
        heads, queries, keys = (np.arange(piece.start, piece.stop) for piece in block)
        return read_only(np.full((1, 1, 1, 1), self.batch), heads[None, :, None, None], queries[:, None], keys)

    def _distance(self, block: Block) -> Array:
        """How far each key is from the diagonal."""
        _, _, i, j = self._indices(block)
        return np.abs(i + self.problem.seqlen_k - self.problem.seqlen_q - j).astype(self.dtype)

    def _piece(self, x: Array, *block: slice) -> Array:
        """These heads, rows and columns of (batch, heads, rows, columns); an axis of length 1 stands for any length."""
        pieces = (slice(self.batch, self.batch + 1), *block)
        return x[tuple(slice(None) if size == 1 else piece for size, piece in zip(x.shape, pieces, strict=True))]

    def _stacked(self, x: Array, block: Block) -> Array:
        """What is said of each pair of a block, as the products have it."""
        _, heads, rows, keys = block.shape
        group_size = self.problem.group_size
        return x.reshape(heads // group_size, group_size * rows, keys)


def _fitted(name: str, x: Any, shape: tuple[int, int, int, int]) -> Array:
    """What a callable returned, broadcast to the shape of the block."""
    try:
        fitted = np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name}: returned shape {np.shape(x)}, which does not broadcast to {shape}, the shape of the scores "
            "(batch, heads, queries, keys)"
        ) from None
    returned(name, fitted)
    return fitted
