"""The public functions: attention, its backward, and both as a vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from . import _checks
from ._backends import Backend, backend_of
from ._problem import Causal, Layout, Operand, Problem, WindowSize

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``."""


_MetaTuple = tuple[tuple[int, ...], tuple[int, ...], Any]


class _Meta(NamedTuple):
    """What a plan depends on of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _meta(array: Array) -> _MetaTuple:
    """The fields of _Meta as a plain tuple, which is made and hashed faster."""
    return array.shape, array.strides, array.dtype


def _contiguous(shape: tuple[int, ...], dtype: Any) -> _Meta:
    """What an array that is yet to be allocated will be like."""
    strides = []
    step = dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return _Meta(shape, tuple(reversed(strides)), dtype)


def _lse_operand(meta: _Meta) -> Operand:
    """lse as (batch, heads, rows, 1), whatever the layout."""
    return Operand.of((*meta.shape, 1), (*_checks.element_strides("lse", meta), 0))


class _Setup(NamedTuple):
    """A checked problem, with its inputs as operands of the full batch."""

    problem: Problem
    operands: dict[str, Operand]
    layout: Layout
    ndim: int


def _set_up(
    backend: Backend,
    q: _Meta,
    k: _Meta,
    v: _Meta,
    scale: Any,
    causal: Any,
    window_size: Any,
    layout: Any,
    kernel: Any,
) -> _Setup:
    dtype = _checks.dtype_of({"q": q, "k": k, "v": v}, backend.dtypes)
    layout = _checks.layout(layout)
    _checks.kernel(kernel, backend.kernels, backend.kind)
    operands = {name: _checks.operand(name, meta, layout) for name, meta in (("q", q), ("k", k), ("v", v))}
    problem = _checks.problem(dtype, operands["q"], operands["k"], operands["v"], scale, causal, window_size)
    full = {name: operand.broadcast_batch(problem.batch) for name, operand in operands.items()}
    return _Setup(problem, full, layout, max(q.ndim, k.ndim, v.ndim))


def _hashable(options: tuple[Any, ...]) -> bool:
    """Whether a plan can be looked up by these options; where not, one of them is wrong, and the checks say which."""
    try:
        hash(options)
    except TypeError:
        return False
    return True


class _ForwardPlan(NamedTuple):
    run: Callable[..., None]
    out: _Meta
    lse: _Meta


@lru_cache(maxsize=4096, typed=True)
def _plan_forward(
    backend: Backend,
    q_meta: _MetaTuple,
    k_meta: _MetaTuple,
    v_meta: _MetaTuple,
    out_meta: _MetaTuple | None,
    scale: Any,
    causal: Any,
    window_size: Any,
    layout: Any,
    kernel: Any,
) -> _ForwardPlan:
    q, k, v = _Meta(*q_meta), _Meta(*k_meta), _Meta(*v_meta)
    setup = _set_up(backend, q, k, v, scale, causal, window_size, layout, kernel)
    problem = setup.problem
    expected = _contiguous(_checks.out_shape(problem, setup.layout, setup.ndim), q.dtype)
    out = expected
    if out_meta is not None:
        out = _Meta(*out_meta)
        _checks.dtype_of({"q": q, "out": out}, backend.dtypes)
        _checks.same_shape("out", out, expected.shape)
        _checks.no_self_overlap("out", out)
    lse = _contiguous(_checks.lse_shape(problem, setup.ndim), _checks.lse_dtype(problem.dtype))
    operands = {**setup.operands, "out": _checks.operand("out", out, setup.layout), "lse": _lse_operand(lse)}
    return _ForwardPlan(backend.plan_forward(problem, kernel, operands), out, lse)


def attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
    out: Array | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
) -> Array | tuple[Array, Array]:
    r"""Exact attention in memory linear in the sequence lengths.

    Computes, for every batch entry and head,

    .. math:: \mathrm{out}_i = \sum_j \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j,
              \qquad s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j

    where the sums run over the keys ``j`` that query ``i`` sees.

    Parameters
    ----------
    q : array, shape (..., Hq, M, D)
        Queries. Like ``k`` and ``v`` a ``cupy.ndarray`` (float16, bfloat16, float32) or a ``numpy.ndarray``
        (float64 as well), with 2 to 4 axes and any strides; no copy is made.
    k : array, shape (..., Hkv, N, D)
        Keys. ``Hq`` must be a multiple of ``Hkv``; query head ``h`` uses key head ``h // (Hq // Hkv)``.
        Batch axes broadcast.
    v : array, shape (..., Hkv, N, Dv)
        Values. ``D`` and ``Dv`` may differ; both are 1 to 256.
    scale : float, optional
        Factor of the scores. Default: ``1 / sqrt(D)``.
    causal : bool or {"bottom-right", "top-left"}
        Query ``i`` sees key ``j`` iff ``j <= i + N - M`` (True, the same as "bottom-right"), or iff ``j <= i``
        ("top-left"). They agree when ``M == N``. With 2 queries and 4 keys::

            bottom-right   1 1 1 0     top-left   1 0 0 0
                           1 1 1 1                1 1 0 0

    window_size : (int or None, int or None), optional
        How many keys a query sees to the left and to the right of its own position, which is aligned as for
        ``causal``; None means no limit.
    layout : {"bhsd", "bshd"}
        Order of the axes: (batch, heads, sequence, dim), or (batch, sequence, heads, dim) as in flash-attn and JAX.
    out : array, optional
        Where to write the result; it must not overlap an input.
    return_lse : bool
        Also return the log of the sum of exponentials of each row of scores.
    kernel : str
        Name of a kernel family, or "auto" for the fastest that supports the call.

    Returns
    -------
    out : array, shape (..., Hq, M, Dv)
        In the dtype of ``q``. Rows that see no key are 0.
    lse : array, shape (..., Hq, M)
        Only if ``return_lse``; natural logarithm, float32 (float64 for float64 inputs), in every layout with heads
        before the sequence. Rows that see no key are -inf.

    Raises
    ------
    TypeError
        If an array is of a kind or dtype that is not supported.
    ValueError
        If shapes do not fit together, or an option has a value that is not allowed.
    NotImplementedError
        If no kernel can compute the call on this GPU.

    Notes
    -----
    Runs on CuPy's current stream and does not synchronise. Scores and sums are float32; float16 and bfloat16 weights
    are rounded to the input type before they multiply ``v``. float32 products have about float32 accuracy, or that of
    TF32 if the environment variable ``CUPY_TF32=1`` was set when cuflash first ran. The same call gives bitwise the
    same result. A NaN or infinity in an input reaches the results that plain attention computes
    from it, and no others; a row whose scores are all -inf counts as one that sees no key.

    References
    ----------
    T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 4, 100, 64), dtype=np.float32)
    >>> cuflash.attention(q, k, v, causal=True).shape
    (2, 4, 100, 64)
    """
    backend = backend_of(q, k, v) if out is None else backend_of(q, k, v, out)
    _checks.flag("return_lse", return_lse)
    options = (scale, causal, _checks.window_size(window_size), layout, kernel)
    plan_forward: Any = _plan_forward if _hashable(options) else _plan_forward.__wrapped__
    plan = plan_forward(backend, _meta(q), _meta(k), _meta(v), None if out is None else _meta(out), *options)
    if out is None:
        out = backend.empty(plan.out.shape, plan.out.dtype)
    else:
        _checks.writable("out", out, backend, q=q, k=k, v=v)
    lse = backend.empty(plan.lse.shape, plan.lse.dtype) if return_lse else None
    plan.run(q, k, v, out, lse)
    return (out, lse) if return_lse else out


class _BackwardPlan(NamedTuple):
    run: Callable[..., None]
    gradients: tuple[_Meta, _Meta, _Meta]  # over the full batch


@lru_cache(maxsize=4096, typed=True)
def _plan_backward(
    backend: Backend,
    dout_meta: _MetaTuple,
    q_meta: _MetaTuple,
    k_meta: _MetaTuple,
    v_meta: _MetaTuple,
    out_meta: _MetaTuple,
    lse_meta: _MetaTuple,
    scale: Any,
    causal: Any,
    window_size: Any,
    layout: Any,
    kernel: Any,
    deterministic: Any,
) -> _BackwardPlan:
    q, k, v = _Meta(*q_meta), _Meta(*k_meta), _Meta(*v_meta)
    dout, out, lse = _Meta(*dout_meta), _Meta(*out_meta), _Meta(*lse_meta)
    setup = _set_up(backend, q, k, v, scale, causal, window_size, layout, kernel)
    problem = setup.problem
    _checks.flag("deterministic", deterministic)
    _checks.dtype_of({"q": q, "dout": dout, "out": out}, backend.dtypes)
    _checks.dtype_of({"lse": lse}, (str(_checks.lse_dtype(problem.dtype)),))
    shape = _checks.out_shape(problem, setup.layout, setup.ndim)
    _checks.same_shape("dout", dout, shape)
    _checks.same_shape("out", out, shape)
    _checks.same_shape("lse", lse, _checks.lse_shape(problem, setup.ndim))

    dq, dk, dv = (_full_batch(meta, problem.batch, setup.layout) for meta in (q, k, v))
    operands = {
        **setup.operands,
        **{
            name: _checks.operand(name, meta, setup.layout)
            for name, meta in (("dout", dout), ("out", out), ("dq", dq), ("dk", dk), ("dv", dv))
        },
        "lse": _lse_operand(lse),
    }
    return _BackwardPlan(backend.plan_backward(problem, kernel, operands), (dq, dk, dv))


def _full_batch(meta: _Meta, batch: int, layout: Layout) -> _Meta:
    """What the gradient of an input is like before it is summed over the batch entries that share the input."""
    shape = meta.shape
    if len(shape) == 2:  # one head
        shape = (1, *shape) if layout == "bhsd" else (shape[0], 1, shape[1])
    if len(shape) == 3:
        shape = (1, *shape)
    return _contiguous(meta.shape if shape[0] == batch else (batch, *shape[1:]), meta.dtype)


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
    kernel: str = "auto",
    deterministic: bool = False,
) -> tuple[Array, Array, Array]:
    r"""Gradients of attention with respect to its inputs.

    With the weights :math:`p_{ij} = e^{s_{ij} - \mathrm{lse}_i}`, recomputed tile by tile, and
    :math:`\delta_i = \mathrm{dout}_i \cdot \mathrm{out}_i`,

    .. math:: dv_j = \sum_i p_{ij} \, \mathrm{dout}_i, \quad
              ds_{ij} = p_{ij} (\mathrm{dout}_i \cdot v_j - \delta_i), \quad
              dq_i = \mathrm{scale} \sum_j ds_{ij} k_j, \quad
              dk_j = \mathrm{scale} \sum_i ds_{ij} q_i

    Parameters
    ----------
    dout : array, shape (..., Hq, M, Dv)
        Gradient with respect to ``out``, in the dtype of ``q``.
    q, k, v : array
        The inputs of :func:`attention`.
    out : array, shape (..., Hq, M, Dv)
    lse : array, shape (..., Hq, M)
        What ``attention(q, k, v, ..., return_lse=True)`` returned.
    scale, causal, window_size, layout, kernel
        As they were in the forward call.
    deterministic : bool
        Whether the result must be bitwise the same in every run. All kernels of this version are deterministic.

    Returns
    -------
    dq, dk, dv : array
        In the shapes and dtypes of ``q``, ``k`` and ``v``; summed over the query heads that share a key head, and
        over broadcast batch axes.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`attention` does.

    Notes
    -----
    Beyond the results it takes 4 bytes for each row of queries, and for an input that was broadcast along the batch
    its gradient for the whole batch, in its own dtype and in float32.

    References
    ----------
    T. Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 2, 100, 64), dtype=np.float32)
    >>> out, lse = cuflash.attention(q, k, v, return_lse=True)
    >>> dq, dk, dv = cuflash.attention_backward(dout, q, k, v, out, lse)
    >>> dk.shape
    (2, 100, 64)
    """
    backend = backend_of(q, k, v, out, dout, lse)
    options = (scale, causal, _checks.window_size(window_size), layout, kernel, deterministic)
    plan_backward: Any = _plan_backward if _hashable(options) else _plan_backward.__wrapped__
    plan = plan_backward(backend, _meta(dout), _meta(q), _meta(k), _meta(v), _meta(out), _meta(lse), *options)
    dq, dk, dv = (backend.empty(meta.shape, meta.dtype) for meta in plan.gradients)
    plan.run(dout, q, k, v, out, lse, dq, dk, dv)
    return _sum_broadcast(dq, q), _sum_broadcast(dk, k), _sum_broadcast(dv, v)


def _sum_broadcast(gradient: Array, array: Array) -> Array:
    """The gradient of an input that was broadcast along the batch is the sum of its copies' gradients."""
    if gradient.shape == array.shape:
        return gradient
    sum_dtype = "float64" if gradient.dtype == "float64" else "float32"
    return gradient.astype(sum_dtype, copy=False).sum(axis=0).astype(gradient.dtype).reshape(array.shape)


def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
    kernel: str = "auto",
    deterministic: bool = False,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Attention, and the function that pulls a gradient of its result back to its inputs.

    Parameters
    ----------
    q, k, v : array
    scale, causal, window_size, layout, kernel
        As for :func:`attention`.
    deterministic : bool
        As for :func:`attention_backward`.

    Returns
    -------
    out : array, shape (..., Hq, M, Dv)
        ``attention(q, k, v, ...)``.
    vjp : callable
        ``vjp(dout)`` returns ``(dq, dk, dv)``. It keeps references to ``q``, ``k``, ``v`` and ``out``: leave them
        unchanged until it has been called.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`attention` does.

    See Also
    --------
    attention_backward : the formulas, and for callers who keep ``out`` and ``lse`` themselves.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 100, 64), dtype=np.float32)
    >>> out, vjp = cuflash.attention_vjp(q, k, v, causal=True)
    >>> dq, dk, dv = vjp(np.ones_like(out))
    >>> dq.shape
    (2, 100, 64)
    """
    _checks.flag("deterministic", deterministic)
    out, lse = attention(
        *(q, k, v),
        scale=scale,
        causal=causal,
        window_size=window_size,
        layout=layout,
        kernel=kernel,
        return_lse=True,
    )

    def vjp(dout: Array) -> tuple[Array, Array, Array]:
        return attention_backward(
            *(dout, q, k, v, out, lse),
            scale=scale,
            causal=causal,
            window_size=window_size,
            layout=layout,
            kernel=kernel,
            deterministic=deterministic,
        )

    return out, vjp
