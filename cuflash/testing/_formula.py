"""Attention and its gradients by their definition, with the whole score matrix, in any arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .. import _check_options, _checks
from .._dropout import dropout_mask
from ._options import Array, Options, as_numpy
from ._scores import Scores, Stacks, check_heads, scale_of, stack, unstack

Results = dict[str, Array]


class Arithmetic(NamedTuple):
    """The dtype to compute in, and the one that factors of products and results are rounded to.

    With `magnitudes`, every term of the sums is replaced by its magnitude.
    """

    work: np.dtype[Any]
    storage: np.dtype[Any]
    magnitudes: bool = False

    @classmethod
    def reference(cls, dtype: DTypeLike = np.float64) -> Arithmetic:
        """Compute in one dtype throughout."""
        return cls(np.dtype(dtype), np.dtype(dtype))

    @classmethod
    def plain(cls, dtype: Any) -> Arithmetic:
        """Compute as plain array code for inputs of this dtype would: in float32, or float64 for float64."""
        return cls(np.dtype(np.float64 if dtype == np.float64 else np.float32), np.dtype(dtype))

    def rounded(self, x: Array) -> Array:
        """Return an array rounded to the dtype `storage`, in the dtype that it has."""
        return x.astype(self.storage).astype(x.dtype)


MAGNITUDES = Arithmetic(np.dtype(np.float64), np.dtype(np.float64), magnitudes=True)


@np.errstate(all="ignore")
def forward(q: Any, k: Any, v: Any, options: Options, arithmetic: Arithmetic) -> Results:
    """Return `out` and `lse`."""
    if options.packed:
        return _each_sequence(forward, {"q": q, "k": k, "v": v}, options, arithmetic)
    stacks = Stacks.of(q, k, v, options.layout, arithmetic.work)
    scores = Scores.of(stacks, options)
    out, lse = _attend(stacks, scores, options, arithmetic)
    if arithmetic.magnitudes:
        weights = _weights(scores, lse) * _dropout(stacks, options)
        out = _visible_sum(weights, np.abs(stacks.v), scores.visible)
        sinks = 0 if options.sinks is None else np.abs(_sinks(options, arithmetic.work))
        lse = np.maximum(scores.size.max(axis=-1, initial=0, keepdims=True), sinks) + np.zeros_like(lse)
    return {
        "out": unstack(out, stacks.rank, options.layout),
        "lse": lse.reshape(lse.shape[4 - stacks.rank : 3]),
    }


@np.errstate(all="ignore")
def gradients(dout: Any, q: Any, k: Any, v: Any, options: Options, arithmetic: Arithmetic) -> Results:
    """Return `dq`, `dk`, `dv`, and `dbias` and `dsinks` where there is a bias and where there are sinks."""
    if options.packed:
        return _each_sequence(gradients, {"dout": dout, "q": q, "k": k, "v": v}, options, arithmetic)
    work, layout = arithmetic.work, options.layout
    stacks = Stacks.of(q, k, v, layout, work)
    scores = Scores.of(stacks, options)
    kept = _dropout(stacks, options)
    out, lse = _attend(stacks, scores, options, arithmetic)
    _checks.same_shape("dout", dout, unstack(out, stacks.rank, layout).shape)
    if options.dlse is not None:
        _checks.same_shape("dlse", options.dlse, lse.shape[4 - stacks.rank : 3])
    grad_out, (q_stack, k_stack, v_stack, _) = stack(dout, layout, work), stacks
    grad_lse = np.zeros((), work) if options.dlse is None else options.dlse.astype(work).reshape(lse.shape)
    raw_slope, bias_slope, scale = scores.raw_slope, scores.bias_slope, scale_of(stacks, options)
    delta = (grad_out * out).sum(axis=-1, keepdims=True) - grad_lse
    if arithmetic.magnitudes:
        q_stack, k_stack, v_stack, grad_out = (np.abs(x) for x in (q_stack, k_stack, v_stack, grad_out))
        raw_slope, bias_slope, scale = np.abs(raw_slope), np.abs(bias_slope), abs(scale)
        delta = -((grad_out * np.abs(out)).sum(axis=-1, keepdims=True) + np.abs(grad_lse))
    weights = _weights(scores, lse)
    dscores = weights * (kept * (grad_out @ v_stack.mT) - delta)  # of the final scores
    dbias = np.where(scores.visible, dscores * bias_slope, 0)
    dscores = arithmetic.rounded(np.where(scores.visible, dscores * raw_slope, 0))
    dropped = arithmetic.rounded(weights * kept)
    dq = _visible_sum(dscores, k_stack, scores.visible) * work.type(scale)
    # The query heads of a group are more rows of the same sums.
    num_heads_kv = stack(k, layout, k.dtype).shape[1]
    visible = np.broadcast_to(scores.visible, (*scores.visible.shape[:1], *dscores.shape[1:]))
    dscores, dropped, grad_out, q_stack, visible = (
        _grouped(x, num_heads_kv) for x in (dscores, dropped, grad_out, q_stack, visible)
    )
    dk = _visible_sum(dscores.mT, q_stack, visible.mT) * work.type(scale)
    dv = _visible_sum(dropped.mT, grad_out, visible.mT)
    results = {
        name: unstack(_summed_to(arithmetic.rounded(x), stack(to, layout, to.dtype).shape), to.ndim, layout)
        for name, x, to in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v))
    }
    if options.bias is not None:
        results["dbias"] = _summed_to(dbias, options.bias.shape)
    if options.sinks is not None:
        sink_weights = np.exp(_sinks(options, work) - _offset(lse))
        results["dsinks"] = -(sink_weights * delta).sum(axis=(0, 2, 3))
    return results


def stored(results: Results, dtype: Any, options: Options) -> Results:
    """Return results for inputs of this dtype as they are given back: gradients in the dtypes of what they are of."""
    own = {"dbias": options.bias, "dsinks": options.sinks}
    dtypes = {name: x.dtype for name, x in own.items() if x is not None}
    return {name: x if name == "lse" else x.astype(dtypes.get(name, dtype)) for name, x in results.items()}


def _attend(stacks: Stacks, scores: Scores, options: Options, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """Return `out` and `lse` as (B, Hq, M, Dv) and (B, Hq, M, 1), `out` rounded but in the working dtype."""
    row_max = scores.final.max(axis=-1, keepdims=True, initial=-np.inf)
    if options.sinks is not None:
        row_max = np.maximum(row_max, _sinks(options, arithmetic.work))
    weights = _weights(scores, row_max)
    row_sum = weights.sum(axis=-1, keepdims=True)
    if options.sinks is not None:
        row_sum = row_sum + np.exp(_sinks(options, arithmetic.work) - _offset(row_max))
    lse = row_max + np.log(row_sum)
    weights = weights / np.where(row_sum == 0, 1, row_sum) * _dropout(stacks, options)
    out = _visible_sum(arithmetic.rounded(weights), stacks.v, scores.visible)
    return arithmetic.rounded(out), np.broadcast_to(lse, (*out.shape[:-1], 1))


def _weights(scores: Scores, base: Array) -> Array:
    """Return ``exp(score - base)``, 0 where hidden."""
    return np.where(scores.visible, np.exp(scores.final - _offset(base)), 0)


def _offset(base: Array) -> Array:
    """Return what to subtract from the scores of each row; -inf, a row without visible keys, becomes 0."""
    return np.where(np.isneginf(base), base.dtype.type(0), base)


def _sinks(options: Options, work: np.dtype[Any]) -> Array:
    return options.sinks.astype(work)[:, None, None]


def _dropout(stacks: Stacks, options: Options) -> Array:
    """Return the factors of the weights: 0, or what makes up for those that are dropped."""
    work = stacks.q.dtype
    if options.dropout_p == 0:
        return np.ones((), work)
    batch, *shape = stacks.shape
    first = options.first_batch
    kept: Array = _kept((first + batch, *shape), options.dropout_p, options.seed.item())[first:]
    return kept.astype(work) / work.type(1 - options.dropout_p)


@lru_cache(maxsize=4)  # the accuracy rule computes one problem many times
def _kept(shape: tuple[int, int, int, int], dropout_p: float, seed: int) -> Array:
    return dropout_mask(shape, dropout_p, seed)


def _visible_sum(weights: Array, values: Array, visible: Array) -> Array:
    """Return ``weights @ values``, summed over the visible pairs alone: 0 * NaN does not appear."""
    non_finite = np.asarray(~np.isfinite(values).all(axis=(0, 1, 3)))
    total = weights @ np.where(non_finite[:, None], 0, values)
    for j in np.flatnonzero(non_finite):
        total = total + np.where(visible[..., j : j + 1], weights[..., j : j + 1] * values[..., j : j + 1, :], 0)
    return total


def _grouped(x: Array, num_heads_kv: int) -> Array:
    """Return (batch, Hq, rows, columns) as (batch, Hkv, group_size * rows, columns)."""
    batch, heads, rows, columns = x.shape
    return x.reshape(batch, num_heads_kv, heads // num_heads_kv * rows, columns)


def _summed_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an array of this shape was broadcast."""
    padded = (1,) * (gradient.ndim - len(shape)) + shape
    broadcast = tuple(axis for axis, size in enumerate(padded) if size != gradient.shape[axis])
    return gradient.sum(axis=broadcast).reshape(shape)


def _each_sequence(
    compute: Callable[..., Results], arrays: dict[str, Any], options: Options, arithmetic: Arithmetic
) -> Results:
    """Compute each sequence of packed arrays by itself, and pack the results."""
    arrays = {name: as_numpy(x) for name, x in arrays.items()}
    (total_q, heads, _), head_dim_v = arrays["q"].shape, arrays["v"].shape[-1]
    num_sequences = _checked_sequences(total_q, len(arrays["k"]), options)
    check_heads(num_sequences, heads, options)
    slopes = options.alibi_slopes
    if slopes is not None:
        slopes = np.broadcast_to(slopes, (num_sequences, heads))
    if options.dlse is not None:
        _checks.same_shape("dlse", options.dlse, (heads, total_q))
    if "dout" in arrays:
        _checks.same_shape("dout", arrays["dout"], (total_q, heads, head_dim_v))
        packed = {"d" + name: np.zeros(arrays[name].shape, arithmetic.work) for name in "qkv"}
        if options.sinks is not None:
            packed["dsinks"] = np.zeros(heads, arithmetic.work)
    else:
        empty = 0 if arithmetic.magnitudes else -np.inf
        packed = {
            "out": np.zeros((total_q, heads, head_dim_v), arithmetic.work),
            "lse": np.full((heads, total_q), empty, arithmetic.work),
        }
    for sequence in range(num_sequences):
        rows_q, rows_k = (slice(*cu[sequence : sequence + 2]) for cu in (options.cu_seqlens_q, options.cu_seqlens_k))
        if options.seqused_k is not None:
            rows_k = slice(rows_k.start, rows_k.start + options.seqused_k[sequence])
        own = options.replace(
            layout="bshd",
            first_batch=sequence,
            alibi_slopes=None if slopes is None else slopes[sequence],
            dlse=None if options.dlse is None else options.dlse[:, rows_q],
            **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
        )
        parts = [x[rows_q if name in ("dout", "q") else rows_k] for name, x in arrays.items()]
        for name, part in compute(*parts, own, arithmetic).items():
            if name == "lse":
                packed[name][:, rows_q] = part
            elif name == "dsinks":
                packed[name] += part
            else:
                packed[name][rows_q if name in ("out", "dq") else rows_k] = part
    return packed


def _checked_sequences(total_q: int, total_k: int, options: Options) -> int:
    """Return the number of packed sequences, if the options cut arrays of these lengths into them."""
    size = _check_options.num_sequences(options.cu_seqlens_q)
    _checks.same_shape("cu_seqlens_k", options.cu_seqlens_k, (size + 1,))
    if options.seqused_k is not None:
        _checks.same_shape("seqused_k", options.seqused_k, (size,))
    _check_options.offset_values(total_q, total_k, options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_k)
    return size
