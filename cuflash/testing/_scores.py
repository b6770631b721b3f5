"""The scores of all pairs, step by step as the documentation of :func:`cuflash.attention` lists them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .. import _check_mods, _check_options, _checks
from .._dual import Dual
from .._problem import Layout
from ._options import Array, Options, as_numpy

BLOCK = 128  # rows and columns of a block of a block mask, as documented: a reference has its own numbers


class Stacks(NamedTuple):
    """The inputs as (batch, heads, rows, columns) with key/value heads repeated, and the rank of the output."""

    q: Array
    k: Array
    v: Array
    rank: int

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, layout: Layout, dtype: DTypeLike) -> Stacks:
        """View arrays of 2 to 4 axes so, in this dtype."""
        rank = max(q.ndim, k.ndim, v.ndim)
        q, k, v = (stack(x, layout, dtype) for x in (q, k, v))
        heads = [x.shape[1] for x in (q, k, v)]
        if heads[1] != heads[2] or heads[1] == 0 or heads[0] % heads[1]:
            raise ValueError(f"q, k and v have {heads} heads; k and v must have as many, and q a multiple of that")
        group_size = heads[0] // heads[1]
        return cls(q, np.repeat(k, group_size, axis=1), np.repeat(v, group_size, axis=1), rank)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the pairs, (B, Hq, M, N)."""
        (batch,) = np.broadcast_shapes(*(x.shape[:1] for x in self[:3]))
        return batch, self.q.shape[1], self.q.shape[2], self.k.shape[2]


class Scores(NamedTuple):
    """The final scores, -inf where hidden, which pairs are visible, and what the scores are made of.

    `raw_slope` and `bias_slope` are the derivatives of a final score by ``scale * q_i . k_j`` and by the bias; `size`
    is the magnitude of its terms.
    """

    final: Array
    visible: Array
    raw_slope: Array
    bias_slope: Array
    size: Array

    @classmethod
    def of(cls, stacks: Stacks, options: Options) -> Scores:
        """Compute the scores of all pairs, in the dtype of the stacks."""
        work = stacks.q.dtype
        check_heads(*stacks.shape[:2], options)
        _check_pairs(stacks.shape, options)
        pairs = indices(stacks.shape, options.first_batch)
        scale = scale_of(stacks, options)
        # Over the whole batch, even where q and k are one for all: the options may tell its entries apart.
        score = np.broadcast_to((stacks.q @ stacks.k.mT) * work.type(scale), stacks.shape)
        size = np.abs(stacks.q) @ np.abs(stacks.k).mT * work.type(abs(scale))
        raw_slope = bias_slope = np.ones_like(score)
        if options.softcap is not None:
            softcap = work.type(options.softcap)
            capped = np.tanh(score / softcap)
            score, raw_slope = softcap * capped, 1 - capped * capped
            size = size * raw_slope
        for term in _added(stacks, options):
            score, size = score + term, size + np.abs(term)
        if options.score_mod is not None:
            score, bias_slope = _modified(options.score_mod, score, pairs)
            raw_slope, size = raw_slope * bias_slope, size * np.abs(bias_slope)
        visible = _visible(stacks.shape, options, pairs)
        # A hidden score hides whatever it is, so that nothing that it was made of matters.
        return cls(
            np.where(visible, score, work.type(-np.inf)),
            visible,
            raw_slope,
            bias_slope,
            np.where(visible, np.maximum(size, np.abs(score)), work.type(0)),
        )


def indices(shape: tuple[int, int, int, int], first_batch: int = 0) -> tuple[Array, ...]:
    """Return ``b, h, i, j`` of all pairs, as arrays that broadcast to their shape."""
    batch, heads, seqlen_q, seqlen_k = (np.arange(n) for n in shape)
    pairs = (batch + first_batch)[:, None, None, None], heads[None, :, None, None], seqlen_q[:, None], seqlen_k
    return _check_mods.read_only(*pairs)


def stack(x: Any, layout: Layout, dtype: DTypeLike) -> Array:
    """Return an array of 2 to 4 axes and any layout as (batch, heads, rows, columns)."""
    x = as_numpy(x).astype(dtype)
    if x.ndim > 2 and layout == "bshd":
        x = x.swapaxes(-2, -3)
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def unstack(x: Array, rank: int, layout: Layout) -> Array:
    """Return (batch, heads, rows, columns) as an array of this rank and layout."""
    x = x.reshape(x.shape[4 - rank :])
    return x.swapaxes(-2, -3) if rank > 2 and layout == "bshd" else x


def scale_of(stacks: Stacks, options: Options) -> float:
    """Return the factor of the scores, ``1 / sqrt(D)`` if none is given."""
    return 1 / math.sqrt(stacks.q.shape[-1]) if options.scale is None else options.scale


def check_heads(batch: int, heads: int, options: Options) -> None:
    """Refuse arrays of another number of heads or batch entries, which might broadcast."""
    allowed = {"alibi_slopes": ((heads,), (1, heads), (batch, heads)), "sinks": ((heads,),)}
    for name, shapes in allowed.items():
        array = getattr(options, name)
        if array is not None and array.shape not in shapes:
            raise ValueError(f"{name}: shape is {array.shape}; allowed are {' and '.join(map(str, shapes))}")


def _check_pairs(shape: tuple[int, int, int, int], options: Options) -> None:
    """Refuse a bias and masks that do not broadcast to the pairs; the pairs might broadcast to them."""
    sizes = {name: array.shape for name in ("bias", "mask") if (array := getattr(options, name)) is not None}
    if options.block_mask is not None:
        _checks.same_shape("block_mask", options.block_mask, shape[2:])
        sizes["block_mask"] = (*options.block_mask.visible.shape[:2], 1, 1)
    for name, size in sizes.items():
        if not _check_options.fits(size, shape):
            raise ValueError(f"{name}: shape {size} does not broadcast to {shape}: (batch, heads, queries, keys)")


def _added(stacks: Stacks, options: Options) -> list[Array]:
    """Return what is added to the capped scores: the bias, and the slope of each head along the distance of a pair."""
    work, (_, _, seqlen_q, seqlen_k) = stacks.q.dtype, stacks.shape
    terms = []
    if options.bias is not None:
        terms.append(options.bias.astype(work))
    if options.alibi_slopes is not None:
        distance = np.abs(np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - np.arange(seqlen_k))
        terms.append(-options.alibi_slopes.astype(work)[..., None, None] * distance.astype(work))
    return terms


def _modified(score_mod: Any, score: Array, pairs: tuple[Array, ...]) -> tuple[Array, Array]:
    """Return the score that the callable makes of another one, and its derivative."""
    modified = score_mod(Dual(score), *pairs)
    if not isinstance(modified, Dual):  # the callable does not look at the score
        modified = Dual(modified, 0.0)
    value, slope = (np.broadcast_to(x, score.shape).astype(score.dtype) for x in (modified.value, modified.slope))
    return value, slope


def _visible(shape: tuple[int, int, int, int], options: Options, pairs: tuple[Array, ...]) -> Array:
    """Return which keys each query sees, as an array that broadcasts to the shape of the pairs."""
    _, _, i, j = pairs
    _, _, seqlen_q, seqlen_k = shape
    ahead = j - i - (0 if options.causal == "top-left" else seqlen_k - seqlen_q)
    visible = np.ones((1, 1, seqlen_q, seqlen_k), bool)
    left, right = options.window_size or (None, None)
    if options.causal:
        visible &= ahead <= 0
    if left is not None:
        visible &= ahead >= -left
    if right is not None:
        visible &= ahead <= right
    shown = np.ones((1, 1, 1, 1), bool)
    if options.mask is not None:
        shown = shown & options.mask
    if options.mask_mod is not None:
        allowed = np.asarray(options.mask_mod(None, *pairs))
        _check_mods.returned("mask_mod", allowed)
        shown = shown & allowed.astype(bool)
    if options.block_mask is not None:
        some, every = (
            as_numpy(x).repeat(BLOCK, axis=-2).repeat(BLOCK, axis=-1)[..., :seqlen_q, :seqlen_k]
            for x in (options.block_mask.visible, options.block_mask.full)
        )
        shown = some & (every | shown)
    return visible & shown
