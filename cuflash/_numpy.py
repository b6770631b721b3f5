"""The NumPy backend: attention in blocks with an online softmax, forward and backward, through BLAS.

The loops are those of FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691): a block of queries
meets the keys block by block, and only one block of scores exists at a time. The query heads that share a
key/value head are stacked as more rows of one block, so that grouped heads cost nothing extra and their
gradients add up inside the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._dual import Dual
from ._numpy_pairs import Block, Pairs
from ._problem import Problem

Array = NDArray[Any]

# Measured at sequence length 4096: a block of float32 scores takes 2 MiB. Smaller blocks are as fast on idle cores,
# but on busy ones the threads of the BLAS wait for each other in every product.
BLOCK_ROWS = 1024
BLOCK_KEYS = 512


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    *,
    sinks: Array | None = None,
    **extras: Any,
) -> None:
    """Write attention to ``out``, its log-sum-exp to ``lse``; axes are ``(batch, heads, rows, columns)``.

    The extras are the options that are arrays, as Problem does not tell them.
    """
    dtype = _compute_dtype(problem)
    scale = dtype.type(problem.softmax_scale)
    if problem.packed:  # rows that belong to no sequence
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
    with np.errstate(all="ignore"):
        for pairs, rows, key_rows in _sequences(problem, dtype, **extras):
            for heads, heads_kv in _head_blocks(pairs.problem):
                for queries in _query_blocks(pairs.problem):
                    here = rows.part(heads, queries)
                    block_q = _stacked(problem, q[here], dtype)
                    acc = np.zeros((*block_q.shape[:2], problem.head_dim_v), dtype)
                    row_max = _sink_logits(sinks, pairs.batch, heads, block_q.shape[:2], dtype)
                    row_sum = np.isfinite(row_max).astype(dtype)  # e^(sink - row_max)
                    for keys in _key_blocks(pairs, heads, queries):
                        there, block = key_rows.part(heads_kv, keys), Block(heads, queries, keys)
                        block_k = np.ascontiguousarray(k[there], dtype)
                        block_v = np.ascontiguousarray(v[there], dtype)
                        # The steps in which the documentation of attention() lists the options.
                        p = pairs.capped(_scaled_product(block_q, block_k, scale))
                        p = pairs.modified(p, block)
                        hidden = pairs.hidden(block)
                        if hidden is not None:
                            np.copyto(p, -np.inf, where=hidden)
                        old_max, row_max = row_max, np.maximum(row_max, p.max(axis=-1))
                        offset = _softmax_offset(row_max)
                        p -= offset[..., None]
                        np.exp(p, out=p)
                        rescale = np.exp(old_max - offset)
                        row_sum = row_sum * rescale + p.sum(axis=-1)
                        survivors = pairs.survivors(block)
                        if survivors is not None:
                            p *= survivors
                        acc *= rescale[..., None]
                        acc += _visible_product(p, block_v, hidden)
                    acc /= np.where(row_sum == 0, 1, row_sum)[..., None]
                    out[here] = acc.reshape(out[here].shape)
                    if lse is not None:
                        lse[here] = (row_max + np.log(row_sum)).reshape(lse[here].shape)


def backward(
    problem: Problem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    *,
    dlse: Array | None = None,
    dbias: Array | None = None,
    sinks: Array | None = None,
    dsinks: Array | None = None,
    **extras: Any,
) -> None:
    """Write the gradients of ``sum(dout * out) + sum(dlse * lse)``, with the weights recomputed from ``lse``.

    ``dbias`` has size 1 along the axes over which it is summed, ``dsinks`` is ``(heads,)``.
    """
    dtype = _compute_dtype(problem)
    scale = dtype.type(problem.softmax_scale)
    if problem.packed:  # rows that belong to no sequence
        for gradient in (dq, dk, dv):
            gradient[...] = 0
    acc_dbias = None if dbias is None else np.zeros(dbias.shape, dtype)
    acc_dsinks = np.zeros(problem.num_heads, dtype)
    with np.errstate(all="ignore"):
        for pairs, rows, key_rows in _sequences(problem, dtype, **extras):
            for heads, heads_kv in _head_blocks(pairs.problem):
                all_keys = key_rows.part(heads_kv, slice(0, pairs.problem.seqlen_k))
                acc_dk = np.zeros(dk[all_keys].shape, dtype)
                acc_dv = np.zeros(dv[all_keys].shape, dtype)
                for queries in _query_blocks(pairs.problem):
                    here = rows.part(heads, queries)
                    block_q = _stacked(problem, q[here], dtype)
                    block_dout = _stacked(problem, dout[here], dtype)
                    delta = (block_dout * _stacked(problem, out[here], dtype)).sum(axis=-1, keepdims=True)
                    if dlse is not None:
                        delta -= _stacked(problem, dlse[here][..., None], dtype)
                    offset = _softmax_offset(_stacked(problem, lse[here][..., None], dtype))
                    if dsinks is not None:
                        logits = _sink_logits(sinks, pairs.batch, heads, block_q.shape[:2], dtype)
                        dlogits = -np.exp(logits - offset[..., 0]) * delta[..., 0]
                        acc_dsinks[heads] += dlogits.reshape(heads.stop - heads.start, -1).sum(axis=-1)
                    acc_dq = np.zeros_like(block_q)
                    for keys in _key_blocks(pairs, heads, queries):
                        there, block = key_rows.part(heads_kv, keys), Block(heads, queries, keys)
                        block_k = np.ascontiguousarray(k[there], dtype)
                        block_v = np.ascontiguousarray(v[there], dtype)
                        capped = pairs.capped(Dual(_scaled_product(block_q, block_k, scale)))
                        final = pairs.modified(Dual(capped.value), block)  # its slope is the derivative by the bias
                        hidden = pairs.hidden(block)
                        p = final.value
                        p -= offset
                        np.exp(p, out=p)
                        ds = block_dout @ block_v.mT
                        survivors = pairs.survivors(block)
                        if survivors is not None:
                            ds *= survivors
                        ds -= delta
                        ds *= p
                        if survivors is not None:
                            p *= survivors
                        if hidden is not None:
                            np.copyto(p, 0, where=hidden)
                            np.copyto(ds, 0, where=hidden)
                        ds = _chain(ds, final.slope, hidden)
                        if acc_dbias is not None:
                            pairs.add_to(acc_dbias, ds, block)
                        ds = _chain(ds, capped.slope, hidden)
                        hidden_from = None if hidden is None else hidden.mT
                        acc_dv[:, keys] += _visible_product(p.mT, block_dout, hidden_from)
                        acc_dk[:, keys] += _visible_product(ds.mT, block_q, hidden_from)
                        acc_dq += _visible_product(ds, block_k, hidden)
                    dq[here] = (acc_dq * scale).reshape(dq[here].shape)
                dk[all_keys] = acc_dk * scale
                dv[all_keys] = acc_dv
        if dbias is not None:
            dbias[...] = acc_dbias
        if dsinks is not None:
            dsinks[...] = acc_dsinks


def _compute_dtype(problem: Problem) -> np.dtype[Any]:
    return np.dtype(np.float64 if problem.dtype == "float64" else np.float32)


class Rows(NamedTuple):
    """Where the rows of a sequence are in arrays of axes (batch, heads, rows, ...)."""

    entry: int
    first: int

    def part(self, heads: slice, rows: slice) -> tuple[int, slice, slice]:
        """The index of some heads and rows of the sequence."""
        return self.entry, heads, slice(self.first + rows.start, self.first + rows.stop)


def _sequences(
    problem: Problem,
    dtype: np.dtype[Any],
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    **options: Any,
) -> Iterator[tuple[Pairs, Rows, Rows]]:
    """Yield each sequence, a batch entry or a stretch of packed rows: its options, and where queries and keys are."""
    for batch in range(problem.batch):
        if not problem.packed:
            yield Pairs(problem, dtype, batch, **options), Rows(batch, 0), Rows(batch, 0)
            continue
        (first_query, end_query), (first_key, end_key) = (
            offsets[batch : batch + 2].tolist() for offsets in (cu_seqlens_q, cu_seqlens_k)
        )
        seqlen_k = end_key - first_key if seqused_k is None else int(seqused_k[batch])
        alone = replace(problem, batch=1, seqlen_q=end_query - first_query, seqlen_k=seqlen_k, packed=False)
        yield Pairs(alone, dtype, batch, **options), Rows(0, first_query), Rows(0, first_key)


def _head_blocks(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Yield ``(heads, heads_kv)``; the heads of short sequences share a block."""
    group_size = problem.group_size
    rows = min(group_size * problem.seqlen_q, BLOCK_ROWS)
    keys = min(problem.seqlen_k, BLOCK_KEYS)
    step = max(1, BLOCK_ROWS * BLOCK_KEYS // max(1, rows * keys))
    for start in range(0, problem.num_heads_kv, step):
        stop = min(start + step, problem.num_heads_kv)
        yield slice(start * group_size, stop * group_size), slice(start, stop)


def _query_blocks(problem: Problem) -> Iterator[slice]:
    step = max(1, BLOCK_ROWS // problem.group_size)
    for start in range(0, problem.seqlen_q, step):
        yield slice(start, min(start + step, problem.seqlen_q))


def _key_blocks(pairs: Pairs, heads: slice, queries: slice) -> Iterator[slice]:
    """Yield the blocks of keys that some of these queries may see."""
    for first, last in pairs.key_ranges(heads, queries):
        for start in range(first, last, BLOCK_KEYS):
            yield slice(start, min(start + BLOCK_KEYS, last))


def _stacked(problem: Problem, x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``(heads, rows, columns)`` as ``(heads_kv, group_size * rows, columns)``."""
    heads, rows, columns = x.shape
    group_size = problem.group_size
    return np.ascontiguousarray(x, dtype).reshape(heads // group_size, group_size * rows, columns)


def _scaled_product(q: Array, k: Array, scale: Any) -> Array:
    """Return ``scale * q @ k.T``; the scale comes last, as in plain attention: it may be too large for q."""
    product: Array = q @ k.mT
    product *= scale
    return product


def _sink_logits(sinks: Array | None, batch: int, heads: slice, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the logit that each row, of these stacked heads, has beside its scores: -inf without sinks."""
    if sinks is None:
        return np.full(shape, -np.inf, dtype)
    logits = sinks[batch, heads, 0].astype(dtype)
    return np.broadcast_to(logits, (len(logits), shape[0] * shape[1] // len(logits))).reshape(shape)


def _chain(gradient: Array, slope: Any, hidden: Array | None) -> Array:
    """Return a gradient of scores times their slope, by the chain rule; hidden pairs stay 0 where the slope is NaN."""
    if np.ndim(slope) == 0 and slope == 1:
        return gradient
    gradient = gradient * slope
    if hidden is not None:
        np.copyto(gradient, 0, where=hidden)
    return gradient


def _softmax_offset(row_max: Array) -> Array:
    """Return what to subtract from the scores of each row; -inf, a row without visible keys, becomes 0."""
    return np.where(np.isneginf(row_max), row_max.dtype.type(0), row_max)


def _visible_product(weights: Array, values: Array, hidden: Array | None) -> Array:
    """Return ``weights @ values``, to which hidden pairs (of weight 0) add nothing, not even 0 * NaN."""
    if hidden is None or np.isfinite(values).all():
        return weights @ values
    finite = np.isfinite(values)
    product = weights @ np.where(finite, values, 0)
    for j in np.flatnonzero(~finite.all(axis=(0, 2))):
        special = np.where(finite[:, j], 0, values[:, j])
        product += np.where(hidden[..., j, None], 0, weights[:, :, j, None] * special[:, None, :])
    return product
