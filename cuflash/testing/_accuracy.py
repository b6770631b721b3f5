"""The accuracy rule: at most twice the error of plain attention in the same dtype, plus one rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._problem import Causal, Layout, WindowSize
from ._reference import (
    as_numpy,
    attention_magnitudes,
    gradient_magnitudes,
    plain_attention,
    plain_attention_backward,
    reference_attention,
    reference_attention_backward,
)

Array = NDArray[Any]

# Half the distance from 1 to the next number, and half the smallest positive number.
_ROUNDING = {
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-134),
    "float32": (2.0**-24, 2.0**-150),
    "float64": (2.0**-53, 0.0),
}

# Half the distance from 1 to the next number of the type that sums are kept in.
_WORKING_ROUNDING = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}

# The largest of few errors is a matter of luck: with fewer elements than this, plain attention is measured
# repeatedly.
_ENOUGH_ELEMENTS = 8192
_REPETITIONS = 8


def assert_attention_accurate(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any = None,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
) -> None:
    """Assert that an output, and its log-sum-exp, are as accurate as they should be.

    The rule: NaN and infinities are in the same places as in the float64 reference, and the largest error is
    at most twice the largest error of plain attention in the input's dtype, plus one rounding of the result.
    Two things keep luck out of the error of plain attention. For small problems it is the largest over the
    problem and 8 copies of it, in which each array is multiplied by a factor between 1/2 and 1 (and the scale
    divided by it), so that every rounding falls anew. And it is at least one rounding in float32 (float64) of
    the sum of the magnitudes of the terms, which is what remains where terms cancel. Results for float64
    inputs are held against a reference in ``numpy.longdouble``, which has to be longer.

    Parameters
    ----------
    q, k, v : array
        The inputs, NumPy or CuPy.
    out : array
        The output to judge.
    lse : array, optional
        The log-sum-exp to judge.
    scale, causal, window_size, layout
        The options of the call, as in :func:`cuflash.attention`.

    Raises
    ------
    AssertionError
        Naming the array, the largest error, where it is and what was allowed.

    Examples
    --------
    >>> import cuflash, numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 17, 8), np.float32)
    >>> out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    >>> assert_attention_accurate(q, k, v, out, lse, causal=True)
    """
    options: dict[str, Any] = {"causal": causal, "window_size": window_size, "layout": layout}
    _assert_rule(
        {"out": out, "lse": lse},
        (as_numpy(q), as_numpy(k), as_numpy(v)),
        scale,
        reference=partial(reference_attention, **options),
        plain=partial(plain_attention, **options),
        magnitudes=partial(attention_magnitudes, **options),
        growth=lambda q, k, v: (v, 1.0),
    )


def assert_gradients_accurate(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    layout: Layout = "bhsd",
) -> None:
    """Assert that the gradients of attention are as accurate as they should be.

    The rule is that of :func:`assert_attention_accurate`, applied to each gradient.

    Parameters
    ----------
    dout, q, k, v : array
        The gradient of the output and the inputs, NumPy or CuPy.
    dq, dk, dv : array
        The gradients to judge.
    scale, causal, window_size, layout
        The options of the call, as in :func:`cuflash.attention`.

    Raises
    ------
    AssertionError
        Naming the gradient, the largest error, where it is and what was allowed.

    Examples
    --------
    >>> import cuflash, numpy as np
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 17, 8), np.float32)
    >>> out, vjp = cuflash.attention_vjp(q, k, v, causal=True)
    >>> assert_gradients_accurate(dout, q, k, v, *vjp(dout), causal=True)
    """
    options: dict[str, Any] = {"causal": causal, "window_size": window_size, "layout": layout}
    _assert_rule(
        {"dq": dq, "dk": dk, "dv": dv},
        (as_numpy(dout), as_numpy(q), as_numpy(k), as_numpy(v)),
        scale,
        reference=partial(reference_attention_backward, **options),
        plain=partial(plain_attention_backward, **options),
        magnitudes=partial(gradient_magnitudes, **options),
        growth=lambda dout, q, k, v: (dout * v / q, dout * v / k, dout),
    )


def _assert_rule(
    results: dict[str, Any],
    arrays: tuple[Array, ...],
    scale: float | None,
    reference: Callable[..., tuple[Array, ...]],
    plain: Callable[..., tuple[Array, ...]],
    magnitudes: Callable[..., tuple[Array, ...]],
    growth: Callable[..., tuple[float, ...]],
) -> None:
    """Hold results against the rule; `growth` says how they grow with factors on the arrays (.., q, k, v)."""
    dtype = arrays[-1].dtype
    reference_dtype = np.longdouble if dtype == np.float64 else np.float64
    if np.finfo(reference_dtype).eps >= np.finfo(np.float64).eps and dtype == np.float64:
        raise NotImplementedError(
            "float64 cannot be judged: numpy.longdouble is no longer than float64 on this platform"
        )
    if scale is None:
        scale = 1 / math.sqrt(arrays[-2].shape[-1])

    expected = reference(*arrays, scale=scale, dtype=reference_dtype)
    plain_results = plain(*arrays, scale=scale)
    plain_errors = _largest_errors(plain_results, expected)
    if min(x.size for x in expected) < _ENOUGH_ELEMENTS:
        for factors in np.random.default_rng(0).uniform(0.5, 1, (_REPETITIONS, len(arrays))).tolist():
            copies = [
                (x.astype(reference_dtype) * factor).astype(dtype) for x, factor in zip(arrays, factors, strict=True)
            ]
            rescaled = scale / (factors[-3] * factors[-2])
            errors = _largest_errors(
                plain(*copies, scale=rescaled), reference(*copies, scale=rescaled, dtype=reference_dtype)
            )
            plain_errors = np.maximum(plain_errors, errors / growth(*factors))
    terms = magnitudes(*arrays, scale=scale)
    for i, (name, result) in enumerate(results.items()):
        if result is not None:
            plain_error = max(plain_errors[i], _WORKING_ROUNDING[dtype.name] * _largest(terms[i]))
            _assert_close(name, as_numpy(result), expected[i], plain_results[i].dtype, plain_error)


def _largest_errors(results: tuple[Array, ...], expected: tuple[Array, ...]) -> Array:
    """Return the largest error of each result, where it and what is expected are finite."""
    return np.array([_errors(*pair).max(initial=0) for pair in zip(results, expected, strict=True)], np.float64)


def _errors(result: Array, expected: Array) -> Array:
    result = result.astype(expected.dtype)
    comparable = np.isfinite(result) & np.isfinite(expected)
    return np.abs(np.subtract(result, expected, out=np.zeros_like(expected), where=comparable))


def _largest(x: Array) -> float:
    """Return the largest finite magnitude."""
    return float(np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max(initial=0))


def _assert_close(name: str, result: Array, expected: Array, dtype: np.dtype[Any], plain_error: float) -> None:
    assert result.shape == expected.shape, f"{name} has shape {result.shape}, expected {expected.shape}"
    assert result.dtype == dtype, f"{name} has dtype {result.dtype}, expected {dtype}"
    rounded = expected.astype(result.dtype)
    for kind, test in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(result) != test(rounded)
        assert not wrong.any(), (
            f"{name} and the reference differ in where they are {kind}, at {wrong.sum()} of {wrong.size} "
            f"elements, first {_at(name, result, expected, np.argmax(wrong))}"
        )
    relative, absolute = _ROUNDING[result.dtype.name]
    rounding = max(relative * _largest(expected), absolute)
    errors = _errors(result, expected)
    error, allowed = errors.max(initial=0), 2 * plain_error + rounding
    assert error <= allowed, (
        f"{name} is not accurate: its largest error is {error:.3g}, allowed is {allowed:.3g} = 2 x "
        f"{plain_error:.3g} of plain attention in this dtype + {rounding:.3g} for one rounding; "
        f"{(errors > allowed).sum()} of {errors.size} elements are worse than allowed, worst "
        f"{_at(name, result, expected, np.argmax(errors))}"
    )


def _at(name: str, result: Array, expected: Array, flat_index: np.intp) -> str:
    index = tuple(int(i) for i in np.unravel_index(flat_index, result.shape))
    return f"{name}[{', '.join(map(str, index))}] = {result[index]}, expected {expected[index]}"
