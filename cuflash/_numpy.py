"""The NumPy backend: attention in blocks with an online softmax, forward and backward, through BLAS.

The loops are those of FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691): a block of queries
meets the keys block by block, and only one block of scores exists at a time. The query heads that share a
key/value head are stacked as more rows of one block, so that grouped heads cost nothing extra and their
gradients add up inside the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._problem import Problem

Array = NDArray[Any]

# Measured at sequence length 4096: a block of float32 scores takes 2 MiB. Smaller blocks are as fast on idle cores,
# but on busy ones the threads of the BLAS wait for each other in every product.
BLOCK_ROWS = 1024
BLOCK_KEYS = 512


def forward(problem: Problem, q: Array, k: Array, v: Array, out: Array, lse: Array | None) -> None:
    """Write attention to ``out``, its log-sum-exp to ``lse``; axes are ``(batch, heads, rows, columns)``."""
    dtype = _compute_dtype(problem)
    with np.errstate(all="ignore"):
        for batch, heads, heads_kv in _head_blocks(problem):
            for queries in _query_blocks(problem):
                here = (batch, heads, queries)
                block_q = _stacked(problem, q[here], dtype) * dtype.type(problem.softmax_scale)
                acc = np.zeros((*block_q.shape[:2], problem.head_dim_v), dtype)
                row_max = np.full(block_q.shape[:2], -np.inf, dtype)
                row_sum = np.zeros(block_q.shape[:2], dtype)
                for keys, hidden in _key_blocks(problem, queries):
                    block_k = np.ascontiguousarray(k[batch, heads_kv, keys], dtype)
                    block_v = np.ascontiguousarray(v[batch, heads_kv, keys], dtype)
                    p = block_q @ block_k.mT
                    if hidden is not None:
                        np.copyto(p, -np.inf, where=hidden)
                    old_max, row_max = row_max, np.maximum(row_max, p.max(axis=-1))
                    offset = _softmax_offset(row_max)
                    p -= offset[..., None]
                    np.exp(p, out=p)
                    rescale = np.exp(old_max - offset)
                    row_sum = row_sum * rescale + p.sum(axis=-1)
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
) -> None:
    """Write the gradients of ``sum(dout * out)``, with the weights recomputed from ``lse``."""
    dtype = _compute_dtype(problem)
    scale = dtype.type(problem.softmax_scale)
    with np.errstate(all="ignore"):
        for batch, heads, heads_kv in _head_blocks(problem):
            acc_dk = np.zeros(dk[batch, heads_kv].shape, dtype)
            acc_dv = np.zeros(dv[batch, heads_kv].shape, dtype)
            for queries in _query_blocks(problem):
                here = (batch, heads, queries)
                block_q = _stacked(problem, q[here], dtype) * scale
                block_dout = _stacked(problem, dout[here], dtype)
                delta = (block_dout * _stacked(problem, out[here], dtype)).sum(axis=-1, keepdims=True)
                offset = _softmax_offset(_stacked(problem, lse[here][..., None], dtype))
                acc_dq = np.zeros_like(block_q)
                for keys, hidden in _key_blocks(problem, queries):
                    block_k = np.ascontiguousarray(k[batch, heads_kv, keys], dtype)
                    block_v = np.ascontiguousarray(v[batch, heads_kv, keys], dtype)
                    p = block_q @ block_k.mT
                    p -= offset
                    np.exp(p, out=p)
                    ds = block_dout @ block_v.mT
                    ds -= delta
                    ds *= p
                    if hidden is not None:
                        np.copyto(p, 0, where=hidden)
                        np.copyto(ds, 0, where=hidden)
                    hidden_from = None if hidden is None else hidden.T
                    acc_dv[:, keys] += _visible_product(p.mT, block_dout, hidden_from)
                    acc_dk[:, keys] += _visible_product(ds.mT, block_q, hidden_from)
                    acc_dq += _visible_product(ds, block_k, hidden)
                dq[here] = (acc_dq * scale).reshape(dq[here].shape)
            dk[batch, heads_kv] = acc_dk
            dv[batch, heads_kv] = acc_dv


def _compute_dtype(problem: Problem) -> np.dtype[Any]:
    return np.dtype(np.float64 if problem.dtype == "float64" else np.float32)


def _head_blocks(problem: Problem) -> Iterator[tuple[int, slice, slice]]:
    """Yield ``(batch, heads, heads_kv)``; the heads of short sequences share a block."""
    group_size = problem.group_size
    rows = min(group_size * problem.seqlen_q, BLOCK_ROWS)
    keys = min(problem.seqlen_k, BLOCK_KEYS)
    step = max(1, BLOCK_ROWS * BLOCK_KEYS // max(1, rows * keys))
    for batch in range(problem.batch):
        for start in range(0, problem.num_heads_kv, step):
            stop = min(start + step, problem.num_heads_kv)
            yield batch, slice(start * group_size, stop * group_size), slice(start, stop)


def _query_blocks(problem: Problem) -> Iterator[slice]:
    step = max(1, BLOCK_ROWS // problem.group_size)
    for start in range(0, problem.seqlen_q, step):
        yield slice(start, min(start + step, problem.seqlen_q))


def _key_blocks(problem: Problem, queries: slice) -> Iterator[tuple[slice, Array | None]]:
    """Yield the blocks of keys that some of these queries see, with the mask of hidden pairs where needed."""
    begin, end = problem.band
    first = max(0, queries.start + begin)
    last = min(problem.seqlen_k, queries.stop - 1 + end)
    for start in range(first, last, BLOCK_KEYS):
        stop = min(start + BLOCK_KEYS, last)
        hidden = None
        if start < queries.stop - 1 + begin or stop > queries.start + end:
            i = np.arange(queries.start, queries.stop)[:, None]
            j = np.arange(start, stop)
            hidden = np.tile((j < i + begin) | (j >= i + end), (problem.group_size, 1))
        yield slice(start, stop), hidden


def _stacked(problem: Problem, x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``(heads, rows, columns)`` as ``(heads_kv, group_size * rows, columns)``."""
    heads, rows, columns = x.shape
    group_size = problem.group_size
    return np.ascontiguousarray(x, dtype).reshape(heads // group_size, group_size * rows, columns)


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
        product += np.where(hidden[:, j, None], 0, weights[:, :, j, None] * special[:, None, :])
    return product
