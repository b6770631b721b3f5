"""Putting together attention that was computed on parts of the keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _checks
from ._backends import Backend, backend_of
from ._problem import Layout

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``. NumPy's functions hand CuPy's arrays over to CuPy's."""


def merge_states(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, /, *, layout: Layout = "bhsd"
) -> tuple[Array, Array]:
    r"""Attention over two sets of keys, out of the attention over each.

    .. math:: \mathrm{lse} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
              \mathrm{out} = e^{\mathrm{lse}_a - \mathrm{lse}} \, \mathrm{out}_a
                           + e^{\mathrm{lse}_b - \mathrm{lse}} \, \mathrm{out}_b

    Parameters
    ----------
    out_a, out_b : array, shape (..., H, M, Dv)
        Results of :func:`attention` for the same queries and disjoint sets of keys; float16, bfloat16, float32 or
        float64, both alike.
    lse_a, lse_b : array, shape (..., H, M)
        Their log-sum-exps; float32, or float64 with results in float64. Where one is -inf, no key was seen, and its
        result does not count, whatever it is. Sinks must be in one of the two alone.
    layout : {"bhsd", "bshd"}, default "bhsd"
        Order of the axes of the results: (..., H, M, Dv), or (..., M, H, Dv), which is that of
        :func:`attention_varlen` too.

    Returns
    -------
    out : array, shape (..., H, M, Dv)
        In the dtype of ``out_a``; computed in that of ``lse_a``.
    lse : array, shape (..., H, M)
        -inf, and ``out`` 0, where both are -inf.

    Raises
    ------
    TypeError, ValueError
        If an array is not of this kind, dtype or shape.

    See Also
    --------
    merge_states_backward : the gradients.

    References
    ----------
    Z. Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving",
    arXiv:2501.01005, section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 100, 64), dtype=np.float32)
    >>> first = cuflash.attention(q, k[:, :70], v[:, :70], return_lse=True)
    >>> rest = cuflash.attention(q, k[:, 70:], v[:, 70:], return_lse=True)
    >>> out, lse = cuflash.merge_states(*first, *rest)
    >>> bool(np.allclose(out, cuflash.attention(q, k, v), atol=1e-6))
    True
    """
    backend = _check(layout, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    out, lse = (backend.empty(x.shape, x.dtype) for x in (out_a, lse_a))
    with backend.temporaries(), np.errstate(all="ignore"):
        weight_a, weight_b, lse[...] = _weights(lse_a, lse_b)
        # A NaN in a result that does not count must not come through as 0 * NaN.
        part_a, part_b = (
            np.where(weight != 0, weight * x.astype(lse.dtype), 0)
            for weight, x in ((_per_row(weight_a, layout), out_a), (_per_row(weight_b, layout), out_b))
        )
        out[...] = part_a + part_b
    return out, lse


def merge_states_backward(
    dout: Array,
    dlse: Array | None,
    out_a: Array,
    lse_a: Array,
    out_b: Array,
    lse_b: Array,
    /,
    *,
    layout: Layout = "bhsd",
) -> tuple[Array, Array, Array, Array]:
    r"""Gradients of :func:`merge_states`.

    With :math:`w_a = e^{\mathrm{lse}_a - \mathrm{lse}}`, and likewise for ``b``,

    .. math:: d\mathrm{out}_a = w_a \, d\mathrm{out}, \qquad
              d\mathrm{lse}_a = w_a \, (d\mathrm{lse} + d\mathrm{out} \cdot (\mathrm{out}_a - \mathrm{out}))

    Parameters
    ----------
    dout : array, shape (..., H, M, Dv)
        Gradient with respect to ``out``, in its dtype.
    dlse : array, shape (..., H, M), or None
        Gradient with respect to ``lse``, in its dtype; None for 0.
    out_a, lse_a, out_b, lse_b : array
        As they were in the forward call.
    layout : {"bhsd", "bshd"}, default "bhsd"
        Likewise.

    Returns
    -------
    dout_a, dlse_a, dout_b, dlse_b : array
        In the shapes and dtypes of the inputs; 0 where a log-sum-exp is -inf.

    Raises
    ------
    TypeError, ValueError
        If an array is not of this kind, dtype or shape.

    References
    ----------
    The derivative of the formula of :func:`merge_states`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> out_a, out_b, dout = rng.standard_normal((3, 4, 100, 64), dtype=np.float32)
    >>> lse_a, lse_b = rng.standard_normal((2, 4, 100), dtype=np.float32)
    >>> dout_a, dlse_a, dout_b, dlse_b = cuflash.merge_states_backward(dout, None, out_a, lse_a, out_b, lse_b)
    >>> bool(np.allclose(dout_a + dout_b, dout, atol=1e-6)), bool(np.allclose(dlse_a, -dlse_b, atol=1e-6))
    (True, True)
    """
    rows = {} if dlse is None else {"dlse": dlse}
    backend = _check(layout, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b, dout=dout, **rows)
    dout_a, dlse_a, dout_b, dlse_b = (backend.empty(x.shape, x.dtype) for x in (out_a, lse_a, out_b, lse_b))
    work = lse_a.dtype
    with backend.temporaries(), np.errstate(all="ignore"):
        weight_a, weight_b, _ = _weights(lse_a, lse_b)
        grad = dout.astype(work)
        # dout . (out_a - out), where out = w_a out_a + w_b out_b, is w_b dout . (out_a - out_b).
        difference = (grad * (out_a.astype(work) - out_b.astype(work))).sum(axis=-1)
        if layout == "bshd" and difference.ndim > 1:
            difference = difference.swapaxes(-1, -2)
        exchange = np.where((weight_a != 0) & (weight_b != 0), weight_a * weight_b * difference, 0)
        # Where nothing was seen a gradient may be infinite, such as that of lse**2.
        direct_a, direct_b = (
            0 if dlse is None else np.where(weight != 0, weight * dlse, 0) for weight in (weight_a, weight_b)
        )
        dlse_a[...], dlse_b[...] = direct_a + exchange, direct_b - exchange
        dout_a[...], dout_b[...] = (
            np.where(weight != 0, weight * grad, 0)
            for weight in (_per_row(weight_a, layout), _per_row(weight_b, layout))
        )
    return dout_a, dlse_a, dout_b, dlse_b


def _weights(lse_a: Array, lse_b: Array) -> tuple[Array, Array, Array]:
    """The shares of the two states in each row, both 0 if neither has seen a key, and the log-sum-exp of both."""
    top = np.maximum(lse_a, lse_b)
    base = np.where(np.isneginf(top), 0, top)
    exp_a, exp_b = np.exp(lse_a - base), np.exp(lse_b - base)
    total = exp_a + exp_b
    divisor = np.where(total == 0, 1, total)
    return exp_a / divisor, exp_b / divisor, base + np.log(total)


def _per_row(x: Array, layout: Layout) -> Array:
    """Numbers of rows, (..., H, M), so that they broadcast to a result of this layout."""
    return (x.swapaxes(-1, -2) if layout == "bshd" and x.ndim > 1 else x)[..., None]


def _check(layout: Layout, *, out_a: Array, lse_a: Array, **others: Array) -> Backend:
    """Refuse results that differ from out_a in dtype and shape, and rows that do not fit it; return the backend."""
    arrays = {"out_a": out_a, "lse_a": lse_a, **others}
    backend = backend_of(*arrays.values(), names=tuple(arrays))
    layout = _checks.layout(layout)
    results = {name: x for name, x in arrays.items() if "out" in name}
    dtype = _checks.dtype_of(results, backend.dtypes)
    if out_a.ndim < 2:
        raise ValueError(f"out_a: shape is {out_a.shape}; it must have 2 axes or more, (..., sequence, head_dim)")
    *leading, heads, seqlen, _ = (1, *out_a.shape) if out_a.ndim == 2 else out_a.shape
    if layout == "bshd" and out_a.ndim > 2:
        heads, seqlen = seqlen, heads
    rows_shape = (seqlen,) if out_a.ndim == 2 else (*leading, heads, seqlen)
    for name, x in arrays.items():
        if name not in results:
            _checks.dtype_of({name: x}, (str(_checks.lse_dtype(dtype)),))
        _checks.same_shape(name, x, out_a.shape if name in results else rows_shape)
    return backend
