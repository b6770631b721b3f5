"""Plans: a call is checked, its kernels are chosen and compiled once, for all calls of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import _check_options, _checks
from ._backends import Backend
from ._dual import needs_derivative
from ._problem import Layout, Mod, Operand, Problem
from ._variants import Meta, MetaTuple, Variant, meta_of

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``."""


class Options(NamedTuple):
    """The options that are no arrays, unchecked."""

    scale: Any
    causal: Any
    window_size: Any
    layout: Any
    kernel: Any
    softcap: Any
    dropout_p: Any
    mod: Mod | None


OptionsTuple = tuple[Any, Any, Any, Any, Any, Any, Any, Mod | None]
"""The fields of Options as a plain tuple."""


def _contiguous(shape: tuple[int, ...], dtype: Any) -> Meta:
    """What an array that is yet to be allocated will be like."""
    strides = []
    step = dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Meta(shape, tuple(reversed(strides)), dtype)


def _row_operand(name: str, meta: Meta) -> Operand:
    """lse or its gradient as (batch, heads, rows, 1), whatever the layout."""
    return Operand.of((*meta.shape, 1), (*_checks.element_strides(name, meta), 0), dtype=str(meta.dtype))


class _Setup(NamedTuple):
    """A checked problem, with its inputs as operands of the full batch."""

    problem: Problem
    operands: dict[str, Operand]
    layout: Layout
    ndim: int


def _set_up(backend: Backend, q: Meta, k: Meta, v: Meta, extras: dict[str, Any], options: Options) -> _Setup:
    inputs = {"q": q, "k": k, "v": v}
    dtype = _checks.dtype_of(inputs, backend.dtypes)
    layout = _checks.layout(options.layout)
    _checks.kernel(options.kernel, backend.kernels, backend.kind)
    packed = "cu_seqlens_q" in extras
    if packed:
        _checks.packed(inputs)
    operands = {name: _checks.operand(name, meta, layout) for name, meta in inputs.items()}
    shapes = operands["q"], operands["k"], operands["v"]
    problem = replace(
        _checks.problem(dtype, *shapes, options.scale, options.causal, options.window_size),
        softcap=_check_options.softcap(options.softcap, dtype),
        dropout_p=_check_options.dropout_p(options.dropout_p, has_seed="seed" in extras),
        mod=options.mod,
    )
    if packed:
        problem = replace(problem, batch=_check_options.num_sequences(extras["cu_seqlens_q"]), packed=True)
    else:
        operands = {name: operand.broadcast_batch(problem.batch) for name, operand in operands.items()}
    operands |= _check_options.operands(problem, extras)
    return _Setup(problem, operands, layout, max(q.ndim, k.ndim, v.ndim))


def _cacheable(options: tuple[Any, ...]) -> bool:
    """Whether a plan can be kept by these options, the mod last.

    All must be hashable, and no Python callable may stay, with its arrays.
    """
    try:
        hash(options)
    except TypeError:  # an option is wrong, and the checks will say which
        return False
    mod = options[-1]
    return mod is None or not (callable(mod.score_mod) or callable(mod.mask_mod))


class _ForwardPlan(NamedTuple):
    run: Callable[..., None]
    out: Meta
    lse: Meta


@lru_cache(maxsize=4096, typed=True)
def _plan_forward(
    backend: Backend,
    q_meta: MetaTuple,
    k_meta: MetaTuple,
    v_meta: MetaTuple,
    out_meta: MetaTuple | None,
    extra_metas: tuple[tuple[str, Any], ...],
    *options: Any,
) -> _ForwardPlan:
    q, k, v = Meta(*q_meta), Meta(*k_meta), Meta(*v_meta)
    chosen = Options(*options)
    setup = _set_up(backend, q, k, v, dict(extra_metas), chosen)
    problem = setup.problem
    expected = _contiguous(_checks.out_shape(problem, setup.layout, setup.ndim), q.dtype)
    out = expected
    if out_meta is not None:
        out = Meta(*out_meta)
        _checks.dtype_of({"q": q, "out": out}, backend.dtypes)
        _checks.same_shape("out", out, expected.shape)
        _checks.no_self_overlap("out", out)
    lse = _contiguous(_checks.lse_shape(problem, setup.ndim), _checks.lse_dtype(problem.dtype))
    operands = {**setup.operands, "out": _checks.operand("out", out, setup.layout), "lse": _row_operand("lse", lse)}
    return _ForwardPlan(backend.plan_forward(problem, chosen.kernel, operands), out, lse)


def run_forward(
    backend: Backend,
    variant: Variant,
    q: Array,
    k: Array,
    v: Array,
    out: Array | None,
    return_lse: bool,
    options: OptionsTuple,
) -> Any:
    """Compute ``out``, or ``(out, lse)``, by the plan of this call."""
    _checks.flag("return_lse", return_lse)
    plan_forward: Any = _plan_forward if _cacheable(options) else _plan_forward.__wrapped__
    out_meta = None if out is None else meta_of(out)
    plan = plan_forward(backend, meta_of(q), meta_of(k), meta_of(v), out_meta, variant.metas, *options)
    if out is None:
        out = backend.empty(plan.out.shape, plan.out.dtype)
    else:
        _checks.writable("out", out, backend, q=q, k=k, v=v, **variant.arrays)
    lse = backend.empty(plan.lse.shape, plan.lse.dtype) if return_lse else None
    plan.run(q, k, v, out, lse, **variant.extras)
    return (out, lse) if return_lse else out


class _BackwardPlan(NamedTuple):
    run: Callable[..., None]
    gradients: tuple[Meta, Meta, Meta]  # over the full batch
    more_gradients: dict[str, Meta]


@lru_cache(maxsize=4096, typed=True)
def _plan_backward(
    backend: Backend,
    dout_meta: MetaTuple,
    q_meta: MetaTuple,
    k_meta: MetaTuple,
    v_meta: MetaTuple,
    out_meta: MetaTuple,
    lse_meta: MetaTuple,
    extra_metas: tuple[tuple[str, Any], ...],
    return_dbias: Any,
    return_dsinks: Any,
    deterministic: Any,
    *options: Any,
) -> _BackwardPlan:
    q, k, v = Meta(*q_meta), Meta(*k_meta), Meta(*v_meta)
    dout, out, lse = Meta(*dout_meta), Meta(*out_meta), Meta(*lse_meta)
    extras, chosen = dict(extra_metas), Options(*options)
    setup = _set_up(backend, q, k, v, extras, chosen)
    problem, layout = setup.problem, setup.layout
    _check_options.gradient_flags(
        extras, return_dbias=return_dbias, return_dsinks=return_dsinks, deterministic=deterministic
    )
    _checks.dtype_of({"q": q, "dout": dout, "out": out}, backend.dtypes)
    shape = _checks.out_shape(problem, layout, setup.ndim)
    _checks.same_shape("dout", dout, shape)
    _checks.same_shape("out", out, shape)
    rows = {name: meta for name, meta in (("lse", lse), ("dlse", extras.get("dlse"))) if meta is not None}
    for name, meta in rows.items():
        _checks.dtype_of({name: meta}, (str(_checks.lse_dtype(problem.dtype)),))
        _checks.same_shape(name, meta, _checks.lse_shape(problem, setup.ndim))

    dq, dk, dv = (_full_batch(meta, setup.operands["q"].shape[0], layout) for meta in (q, k, v))
    wanted = {"dbias": return_dbias, "dsinks": return_dsinks}
    more_gradients = {
        name: _contiguous(extras[name[1:]].shape, extras[name[1:]].dtype) for name, asked in wanted.items() if asked
    }
    operands = {
        **setup.operands,
        **{
            name: _checks.operand(name, meta, layout)
            for name, meta in (("dout", dout), ("out", out), ("dq", dq), ("dk", dk), ("dv", dv))
        },
        **{name: _row_operand(name, meta) for name, meta in rows.items()},
        **{name: _check_options.GRADIENT_OPERANDS[name](name, meta) for name, meta in more_gradients.items()},
    }
    run = backend.plan_backward(problem, chosen.kernel, operands, deterministic=deterministic)
    return _BackwardPlan(run, (dq, dk, dv), more_gradients)


def _full_batch(meta: Meta, batch: int, layout: Layout) -> Meta:
    """What the gradient of an input is like before it is summed over the batch entries that share the input."""
    shape = meta.shape
    if len(shape) == 2:  # one head
        shape = (1, *shape) if layout == "bhsd" else (shape[0], 1, shape[1])
    if len(shape) == 3:
        shape = (1, *shape)
    return _contiguous(meta.shape if shape[0] == batch else (batch, *shape[1:]), meta.dtype)


def run_backward(
    backend: Backend,
    variant: Variant,
    arrays: tuple[Array, Array, Array, Array, Array, Array],
    gradients: tuple[Any, Any, Any],
    options: OptionsTuple,
) -> tuple[Array, ...]:
    """Compute ``(dq, dk, dv)``, dbias and dsinks where asked for, by the plan of this call.

    `arrays` are dout, q, k, v, out and lse, `gradients` are return_dbias, return_dsinks and deterministic.
    """
    plan_backward: Any = _plan_backward if _cacheable((*gradients, *options)) else _plan_backward.__wrapped__
    plan = plan_backward(backend, *map(meta_of, arrays), variant.metas, *gradients, *options)
    _, q, k, v, _, _ = arrays
    dq, dk, dv = (_empty_gradient(backend, meta, x) for meta, x in zip(plan.gradients, (q, k, v), strict=True))
    more = {name: backend.empty(meta.shape, meta.dtype) for name, meta in plan.more_gradients.items()}
    plan.run(*arrays, dq, dk, dv, **variant.extras, **more)
    gradients_of_inputs = (_sum_broadcast(backend, gradient, x) for gradient, x in ((dq, q), (dk, k), (dv, v)))
    return *gradients_of_inputs, *more.values()


def _empty_gradient(backend: Backend, meta: Meta, array: Array) -> Array:
    """Where the gradient of an input is to be written: what is yet to be summed is not the result."""
    if meta.shape == array.shape:
        return backend.empty(meta.shape, meta.dtype)
    with backend.temporaries():
        return backend.empty(meta.shape, meta.dtype)


def _sum_broadcast(backend: Backend, gradient: Array, array: Array) -> Array:
    """The gradient of an input that was broadcast along the batch is the sum of its copies' gradients."""
    if gradient.shape == array.shape:
        return gradient
    sum_dtype = "float64" if gradient.dtype == "float64" else "float32"
    with np.errstate(all="ignore"):  # what float16 cannot hold is infinite without a warning, as in all gradients
        with backend.temporaries():
            summed = gradient.astype(sum_dtype, copy=False).sum(axis=0)
        return summed.astype(gradient.dtype).reshape(array.shape)


def make_vjp(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inputs: tuple[Array, Array, Array],
    offsets: tuple[Array, ...],
    options: dict[str, Any],
    *,
    return_lse: bool,
    **gradient_options: Any,
) -> tuple[Any, Callable[..., tuple[Array, ...]]]:
    """A forward call, and its backward with the same options as a function of dout and dlse."""
    if "out" in options:
        raise TypeError("out: is not an option of a vjp; the call keeps its result for the backward pass")
    _checks.flag("return_lse", return_lse)
    _check_options.gradient_flags(
        [name for name, value in options.items() if value is not None],
        **{"return_dbias": False, "return_dsinks": False} | gradient_options,
    )
    score_mod = options.get("score_mod")
    differentiable = {"score_mod": needs_derivative(score_mod)} if callable(score_mod) else {}
    out, lse = forward(*inputs, *offsets, return_lse=True, **options | differentiable)

    def vjp(dout: Array, dlse: Array | None = None) -> tuple[Array, ...]:
        return backward(dout, *inputs, out, lse, *offsets, dlse=dlse, **options, **gradient_options)

    return ((out, lse) if return_lse else out), vjp
