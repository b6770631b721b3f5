"""Attention by its definition, with the whole score matrix: the reference, and the plain one of a dtype."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .._problem import Causal, Layout, WindowSize

Array = NDArray[Any]


def reference_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array]:
    r"""Compute attention in float64, as the formula says.

    .. math:: O = \mathrm{softmax}(\text{scale} \cdot Q K^T) V, \qquad
              \mathrm{lse}_i = \log \sum_j \exp(\text{scale} \cdot q_i k_j)

    Sums run over the visible keys alone: what a hidden key or value holds, NaN included, has no influence.
    A row without visible keys gives 0 and a log-sum-exp of -inf.

    Parameters
    ----------
    q, k, v : array
        Queries ``(..., Hq, M, D)``, keys ``(..., Hkv, N, D)`` and values ``(..., Hkv, N, Dv)``, 2-D or more,
        NumPy or CuPy, of any floating dtype; the batch axes broadcast, and ``Hq`` is a multiple of ``Hkv``.
    scale, causal, window_size, layout
        As in :func:`cuflash.attention`.
    dtype : dtype, default float64
        The type to compute in; ``numpy.longdouble`` gives a reference for float64.

    Returns
    -------
    out : numpy.ndarray
        ``(..., Hq, M, Dv)`` in `dtype`, in the layout asked for.
    lse : numpy.ndarray
        ``(..., Hq, M)`` in `dtype`, whatever the layout.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> out, lse = reference_attention(q, k, v)
    >>> out.item(), round(lse.item(), 4)
    (2.0, 0.6931)
    """
    operands = _Operands.of(q, k, v, layout, dtype)
    pairs = _visible_pairs(operands, causal, window_size)
    out, lse, _ = _forward(operands, pairs, _scale(operands, scale), storage=np.dtype(dtype))
    return _restore(out, operands.rank, layout), _restore_lse(lse, operands.rank)


def reference_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array, Array]:
    r"""Compute the gradients of ``sum(dout * out)`` in float64, as the formula says.

    .. math:: dV = P^T dO, \quad dS = P \circ (dO V^T - \mathrm{rowsum}(dO \circ O)), \quad
              dQ = \text{scale} \cdot dS K, \quad dK = \text{scale} \cdot dS^T Q

    Parameters
    ----------
    dout : array
        The gradient of the output, of the output's shape.
    q, k, v, scale, causal, window_size, layout, dtype
        As in :func:`reference_attention`.

    Returns
    -------
    dq, dk, dv : numpy.ndarray
        Of the shapes of `q`, `k` and `v`, in `dtype`; gradients of broadcast axes and grouped heads are
        summed.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> dq, dk, dv = reference_attention_backward(np.ones((1, 1)), q, k, v)
    >>> dv.ravel().tolist()
    [0.5, 0.5]
    """
    return _gradients(dout, q, k, v, scale, causal, window_size, layout, np.dtype(dtype), np.dtype(dtype))


def plain_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
) -> tuple[Array, Array]:
    """Compute attention as plain array code in the input's dtype would: the yardstick of accuracy.

    Scores and softmax are computed in float32 (float64 for float64 inputs), the weights are rounded to the
    input's dtype before they meet the values, and so is the output. Parameters and shapes are those of
    :func:`reference_attention`; `out` has the dtype of `q`, `lse` is float32 (float64).

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = plain_attention(*np.ones((3, 5, 8), np.float16))
    >>> out.dtype.name, lse.dtype.name
    ('float16', 'float32')
    """
    work, storage = _plain_dtypes(q)
    operands = _Operands.of(q, k, v, layout, work)
    pairs = _visible_pairs(operands, causal, window_size)
    out, lse, _ = _forward(operands, pairs, _scale(operands, scale), storage)
    return _restore(out, operands.rank, layout).astype(storage), _restore_lse(lse, operands.rank)


def plain_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
) -> tuple[Array, Array, Array]:
    """Compute the gradients as plain array code in the input's dtype would; see :func:`plain_attention`.

    As a backward pass that is given `out` and `lse` of the forward pass, it computes ``rowsum(dO * O)`` from
    the rounded output and ``P = exp(S - lse)`` from the rounded `lse`; ``P`` and ``dS`` are rounded to the
    input's dtype before they are multiplied. Parameters and shapes are those of
    :func:`reference_attention_backward`; the gradients have the dtype of `q`.

    Examples
    --------
    >>> import numpy as np
    >>> dq, dk, dv = plain_attention_backward(*np.ones((4, 5, 8), np.float16))
    >>> dv.dtype.name, dv.shape
    ('float16', (5, 8))
    """
    work, storage = _plain_dtypes(q)
    gradients = _gradients(dout, q, k, v, scale, causal, window_size, layout, work, storage)
    dq, dk, dv = (x.astype(storage) for x in gradients)
    return dq, dk, dv


def attention_magnitudes(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
) -> tuple[Array, Array]:
    """Return what the sums behind `out` and `lse` come to when every term is replaced by its magnitude."""
    operands = _Operands.of(q, k, v, layout, np.float64)
    visible = _visible_pairs(operands, causal, window_size)
    scale = _scale(operands, scale)
    q_stack, k_stack, v_stack, _ = (np.abs(x) for x in operands)
    with np.errstate(all="ignore"):
        _, lse, scores = _forward(operands, visible, scale, np.dtype(np.float64))
        weights = np.where(visible, np.exp(scores - _softmax_offset(lse)[..., None]), 0)
        out = _visible_sum(weights, v_stack, visible)
        largest = np.where(visible, q_stack @ k_stack.mT * abs(scale), 0).max(axis=-1, initial=0)
    return out, largest


def gradient_magnitudes(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
) -> tuple[Array, Array, Array]:
    """Return what the sums behind the gradients come to when every term is replaced by its magnitude."""
    work = np.dtype(np.float64)
    return _gradients(dout, q, k, v, scale, causal, window_size, layout, work, work, magnitudes=True)


def as_numpy(x: Any) -> Array:
    """Return a NumPy or CuPy array as a NumPy array."""
    return np.asarray(x.get() if hasattr(x, "get") else x)


class _Operands(NamedTuple):
    """The arrays as stacks ``(..., Hq, rows, columns)`` that broadcast; key/value heads are repeated."""

    q: Array
    k: Array
    v: Array
    rank: int

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, layout: Layout, dtype: DTypeLike) -> _Operands:
        rank = max(q.ndim, k.ndim, v.ndim)
        q, k, v = (_stack(x, layout, dtype) for x in (q, k, v))
        group_size = q.shape[-3] // k.shape[-3]
        return cls(q, np.repeat(k, group_size, axis=-3), np.repeat(v, group_size, axis=-3), rank)


def _stack(x: Any, layout: Layout, dtype: DTypeLike) -> Array:
    """Return an array of any rank and layout as ``(..., H, rows, columns)``."""
    x = as_numpy(x).astype(dtype)
    if x.ndim == 2:
        return x[None]
    return x.swapaxes(-2, -3) if layout == "bshd" else x


def _restore(x: Array, rank: int, layout: Layout) -> Array:
    if rank == 2:
        return x[0]
    return x.swapaxes(-2, -3) if layout == "bshd" else x


def _restore_lse(lse: Array, rank: int) -> Array:
    return lse[0] if rank == 2 else lse


def _scale(operands: _Operands, scale: float | None) -> float:
    return 1 / math.sqrt(operands.q.shape[-1]) if scale is None else scale


def _plain_dtypes(q: Any) -> tuple[np.dtype[Any], np.dtype[Any]]:
    storage = np.dtype(q.dtype)
    return np.dtype(np.float64 if storage == np.float64 else np.float32), storage


def _visible_pairs(operands: _Operands, causal: Causal, window_size: WindowSize) -> Array:
    """Return the ``(M, N)`` mask of the keys that each query sees."""
    seqlen_q, seqlen_k = operands.q.shape[-2], operands.k.shape[-2]
    diagonal = 0 if causal == "top-left" else seqlen_k - seqlen_q
    ahead = np.arange(seqlen_k) - (np.arange(seqlen_q)[:, None] + diagonal)
    visible = np.ones((seqlen_q, seqlen_k), bool)
    if causal:
        visible &= ahead <= 0
    left, right = window_size or (None, None)
    if left is not None:
        visible &= ahead >= -left
    if right is not None:
        visible &= ahead <= right
    return visible


def _forward(operands: _Operands, visible: Array, scale: float, storage: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """Return ``(out, lse, scores)``, `out` rounded to the dtype `storage` but kept in the working dtype."""
    q, k, v, _ = operands
    with np.errstate(all="ignore"):
        scores = np.where(visible, (q @ k.mT) * q.dtype.type(scale), -np.inf)
        row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        offset = _softmax_offset(row_max)
        weights = np.where(visible, np.exp(scores - offset), 0)
        row_sum = weights.sum(axis=-1, keepdims=True)
        weights = weights / np.where(row_sum == 0, 1, row_sum)
        lse = (row_max + np.log(row_sum))[..., 0]
        out = _visible_sum(_rounded(weights, storage), v, visible)
        lse = np.broadcast_to(lse, out.shape[:-1]).copy()
    return _rounded(out, storage), lse, scores


def _softmax_offset(row_max: Array) -> Array:
    """Return what to subtract from the scores of each row; -inf, a row without visible keys, becomes 0."""
    return np.where(np.isneginf(row_max), row_max.dtype.type(0), row_max)


def _gradients(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    causal: Causal,
    window_size: WindowSize,
    layout: Layout,
    work: np.dtype[Any],
    storage: np.dtype[Any],
    magnitudes: bool = False,
) -> tuple[Array, Array, Array]:
    """Return the gradients computed in the dtype `work`, with the factors of products rounded to `storage`.

    With `magnitudes`, every term of the sums is replaced by its magnitude.
    """
    operands = _Operands.of(q, k, v, layout, work)
    visible = _visible_pairs(operands, causal, window_size)
    scale = _scale(operands, scale)
    out, lse, scores = _forward(operands, visible, scale, storage)
    q_stack, k_stack, v_stack, _ = operands
    grad_out = _stack(dout, layout, work)
    with np.errstate(all="ignore"):
        weights = np.where(visible, np.exp(scores - _softmax_offset(lse)[..., None]), 0)
        delta = (grad_out * out).sum(axis=-1, keepdims=True)
        if magnitudes:
            q_stack, k_stack, v_stack, grad_out = (np.abs(x) for x in (q_stack, k_stack, v_stack, grad_out))
            scale, delta = abs(scale), -(grad_out * np.abs(out)).sum(axis=-1, keepdims=True)
        dscores = np.where(visible, weights * (grad_out @ v_stack.mT - delta), 0)
        dscores, weights = _rounded(dscores, storage), _rounded(weights, storage)
        dq = _visible_sum(dscores, k_stack, visible) * work.type(scale)
        # The query heads of a group are more rows of the same sums.
        group_size = q_stack.shape[-3] // _stack(k, layout, k.dtype).shape[-3]
        dscores, weights, grad_out, q_stack = (_grouped(x, group_size) for x in (dscores, weights, grad_out, q_stack))
        seen_by = np.tile(visible.T, group_size)
        dk = _visible_sum(dscores.mT, q_stack, seen_by) * work.type(scale)
        dv = _visible_sum(weights.mT, grad_out, seen_by)
        dq, dk, dv = (_summed_to(_rounded(x, storage), to, layout) for x, to in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    return x.astype(dtype).astype(x.dtype)


def _visible_sum(weights: Array, values: Array, visible: Array) -> Array:
    """Return ``weights @ values``, summed over the visible pairs alone: 0 * NaN does not appear."""
    if np.isfinite(values).all():
        return weights @ values
    batch = np.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
    total = np.empty((*batch, weights.shape[-2], values.shape[-1]), weights.dtype)
    for i, seen in enumerate(visible):
        total[..., i, :] = (weights[..., i : i + 1, seen] @ values[..., seen, :])[..., 0, :]
    return total


def _grouped(x: Array, group_size: int) -> Array:
    """Return ``(..., Hq, rows, columns)`` as ``(..., Hkv, group_size * rows, columns)``."""
    *batch, heads, rows, columns = x.shape
    return x.reshape(*batch, heads // group_size, group_size * rows, columns)


def _summed_to(gradient: Array, x: Any, layout: Layout) -> Array:
    """Sum the gradient of a broadcast stack to the shape of the array `x` it came from."""
    shape = _stack(x, layout, x.dtype).shape
    padded = (1,) * (gradient.ndim - len(shape)) + shape
    broadcast = tuple(axis for axis, size in enumerate(padded) if size != gradient.shape[axis])
    return _restore(gradient.sum(axis=broadcast).reshape(shape), x.ndim, layout)
