"""The naive family: attention as it is written down, with the matrices of all scores S and of all weights P.

What people wrote before flash attention, to be compared with: a product, a softmax over whole rows, another product,
as operations of the arrays' own module. Scores are float32, weights are rounded to the dtype of the inputs. As in any
such code, NaN and infinity in hidden values and keys are multiplied by 0, and reach every query of their head.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._call import Call, Run
from ._device import Chip
from ._options import PLAIN, Options
from ._problem import Operand, Problem

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``; in `forward` and `backward` of four axes: (batch, heads, rows, columns)."""

CAN = ("softcap", "bias", "alibi", "mask", "sinks")


def why_not(
    problem: Problem, number: str, chip: Chip, options: Options = PLAIN, operands: Mapping[str, Operand] | None = None
) -> str | None:
    """The reason why the family cannot compute the problem, or None if it can."""
    missing = [argument for name, argument in zip(options.names, options.arguments, strict=True) if name not in CAN]
    return f"it has no {', '.join(missing)}" if missing else None


def why_no_backward(problem: Problem, chip: Chip, options: Options = PLAIN) -> str | None:
    """None: it can compute gradients."""
    return None


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Array) -> None:
        forward(call.problem, **_views(call.operands, {"q": q, "k": k, "v": v, "out": out, "lse": lse, **extras}))

    return run


def plan_backward(call: Call) -> Run:
    """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
    names = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")

    def run(*arrays: Array, **extras: Array) -> None:
        backward(call.problem, **_views(call.operands, {**dict(zip(names, arrays, strict=True)), **extras}))

    return run


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None = None,
    *,
    sinks: Array | None = None,
    **score_options: Array,
) -> None:
    """Write ``softmax(S) V`` to `out` and the log-sum-exp of the rows of S to `lse`."""
    if problem.seqlen_k == 0:  # rows without a maximum
        out[...] = 0
        if lse is not None:
            lse[...] = -math.inf if sinks is None else sinks
        return
    xp = _module(q)
    with np.errstate(all="ignore"):
        p = _scores(problem, _capped_products(problem, q, k), **score_options)
        sink = -math.inf if sinks is None else sinks.astype(np.float32)
        row_max = xp.maximum(p.max(axis=-1, keepdims=True), sink)
        offset = _softmax_offset(row_max)
        p -= offset
        xp.exp(p, out=p)
        row_sum = p.sum(axis=-1, keepdims=True) + xp.exp(sink - offset)
        p /= xp.where(row_sum == 0, np.float32(1), row_sum)
        out[...] = _product(problem, p.astype(q.dtype, copy=False), v).reshape(out.shape)
        if lse is not None:
            lse[...] = row_max + xp.log(row_sum)


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
    sinks: Array | None = None,
    dsinks: Array | None = None,
    dbias: Array | None = None,
    **score_options: Array,
) -> None:
    """Write the gradients of ``sum(dout * out) + sum(dlse * lse)``, with P computed again from `lse`."""
    xp = _module(q)
    with np.errstate(all="ignore"):
        delta = (dout.astype(np.float32) * out.astype(np.float32)).sum(axis=-1, keepdims=True)
        if dlse is not None:
            delta -= dlse
        offset = _softmax_offset(lse)
        if dsinks is not None and sinks is not None:
            dsinks[...] = _summed_to(dsinks.shape, -xp.exp(sinks.astype(np.float32) - offset) * delta)
        capped = _capped_products(problem, q, k)
        slope = None if problem.softcap is None else 1 - (capped / np.float32(problem.softcap)) ** 2
        p = _scores(problem, capped, **score_options)
        p -= offset
        xp.exp(p, out=p)
        dv[...] = _product(problem, p.astype(q.dtype, copy=False), dout, transpose_a=True)
        ds = _product(problem, dout, v, transpose_b=True).reshape(p.shape)
        ds -= delta
        ds *= p
        if dbias is not None:
            dbias[...] = _summed_to(dbias.shape, ds)
        if slope is not None:
            ds *= slope
        scale = np.float32(problem.softmax_scale)
        ds = ds.astype(q.dtype, copy=False)
        dq[...] = _product(problem, ds, k).reshape(dq.shape) * scale
        dk[...] = _product(problem, ds, q, transpose_a=True) * scale


def _capped_products(problem: Problem, q: Array, k: Array) -> Array:
    """``scale * q @ k.T``, with the soft cap."""
    s = _product(problem, q, k, transpose_b=True)
    s = s.reshape(problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
    s *= np.float32(problem.softmax_scale)
    if problem.softcap is not None:
        cap = np.float32(problem.softcap)
        s /= cap
        _module(s).tanh(s, out=s)
        s *= cap
    return s


def _scores(
    problem: Problem,
    s: Array,
    *,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The scores that the softmax takes, in the place of `s`; those of hidden pairs are -inf."""
    xp = _module(s)
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    i, j = xp.arange(seqlen_q)[:, None], xp.arange(seqlen_k)
    if bias is not None:
        s += bias.astype(np.float32, copy=False)
    if alibi_slopes is not None:
        s -= alibi_slopes * abs(i + (seqlen_k - seqlen_q) - j).astype(np.float32)
    begin, end = problem.band
    if seqlen_q - 1 + begin > 0 or end < seqlen_k:
        xp.copyto(s, -math.inf, where=(j < i + begin) | (j >= i + end))
    if mask is not None:
        xp.copyto(s, -math.inf, where=~mask)
    return s


def _product(problem: Problem, a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """Products in float32 for each key head; the query heads that share it are more rows of its matrix."""
    a, b = _stacked(problem, a), _stacked(problem, b)
    if isinstance(a, np.ndarray):
        a, b = (x.astype(np.float32, copy=False) for x in (a, b))
        return (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
    from . import _cublas

    return _cublas.product(a, b, transpose_a=transpose_a, transpose_b=transpose_b)


def _stacked(problem: Problem, x: Array) -> Array:
    batch, heads, rows, columns = x.shape
    heads_kv = problem.num_heads_kv
    return _module(x).ascontiguousarray(x).reshape(batch, heads_kv, heads // heads_kv * rows, columns)


def _softmax_offset(row_max: Array) -> Array:
    """What to subtract from the scores of each row; -inf, a row without visible keys, becomes 0."""
    return _module(row_max).where(row_max == -math.inf, np.float32(0), row_max)


def _summed_to(shape: tuple[int, ...], gradient: Array) -> Array:
    """The sum over the axes that a gradient has in full and an array of this shape has not."""
    axes = tuple(axis for axis, size in enumerate(shape) if size != gradient.shape[axis])
    return gradient.sum(axis=axes, keepdims=True)


def _module(array: Array) -> Any:
    """NumPy or CuPy, whose array it is."""
    return sys.modules[type(array).__module__]


def _views(operands: Mapping[str, Operand], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays that have an operand, by name, as it sees them."""

    def view(array: Array, operand: Operand) -> Array:
        strides = tuple(stride * array.itemsize for stride in operand.strides)
        return _module(array).lib.stride_tricks.as_strided(array, operand.shape, strides)

    return {
        name: view(array, operands[name]) for name, array in arrays.items() if name in operands and array is not None
    }
