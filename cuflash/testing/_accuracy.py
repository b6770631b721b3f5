"""The accuracy rule: at most twice the error of plain attention in the same dtype, plus one rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _checks
from ._formula import MAGNITUDES, Arithmetic, Results, forward, gradients, stored
from ._options import Array, Options, as_numpy

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


def assert_attention_accurate(q: Any, k: Any, v: Any, out: Any, lse: Any = None, /, **options: Any) -> None:
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
    **options
        The options of the call, as in :func:`reference_attention`.

    Raises
    ------
    AssertionError
        Naming the array, the largest error, where it is and what was allowed.
    TypeError, ValueError
        As :func:`reference_attention` does; TypeError also if the inputs are not of one dtype out of float16,
        bfloat16, float32 and float64.
    NotImplementedError
        For float64, where ``numpy.longdouble`` is no longer than that.

    References
    ----------
    As of :func:`plain_attention`.

    Examples
    --------
    >>> import cuflash, numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 17, 8), np.float32)
    >>> out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    >>> assert_attention_accurate(q, k, v, out, lse, causal=True)
    """
    _assert_rule(forward, {"q": q, "k": k, "v": v}, Options.of(options), {"out": out}, {"lse": lse})


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
    dlse: Any = None,
    dbias: Any = None,
    dsinks: Any = None,
    **options: Any,
) -> None:
    """Assert that the gradients of attention are as accurate as they should be.

    The rule is that of :func:`assert_attention_accurate`, applied to each gradient.

    Parameters
    ----------
    dout, q, k, v : array
        The gradient of the output and the inputs, NumPy or CuPy.
    dq, dk, dv : array
        The gradients to judge.
    dlse : array, optional
        The gradient of the log-sum-exp, as in :func:`reference_attention_backward`.
    dbias, dsinks : array, optional
        The gradients of the options `bias` and `sinks` to judge.
    **options
        The options of the call, as in :func:`reference_attention`.

    Raises
    ------
    AssertionError
        Naming the gradient, the largest error, where it is and what was allowed.
    TypeError, ValueError, NotImplementedError
        As :func:`assert_attention_accurate` does; ValueError also for `dbias` without `bias`, and `dsinks` without
        `sinks`.

    References
    ----------
    As of :func:`plain_attention`.

    Examples
    --------
    >>> import cuflash, numpy as np
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 17, 8), np.float32)
    >>> out, vjp = cuflash.attention_vjp(q, k, v, causal=True)
    >>> assert_gradients_accurate(dout, q, k, v, *vjp(dout), causal=True)
    """
    arrays, results = {"dout": dout, "q": q, "k": k, "v": v}, {"dq": dq, "dk": dk, "dv": dv}
    _assert_rule(gradients, arrays, Options.of(options, dlse=dlse), results, {"dbias": dbias, "dsinks": dsinks})


def assert_attention_varlen_accurate(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, out: Any, lse: Any = None, /, **options: Any
) -> None:
    """Assert that an output of packed sequences, and its log-sum-exp, are as accurate as they should be.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k : array
        The inputs, as in :func:`reference_attention_varlen`.
    out, lse
        The results to judge, as in :func:`assert_attention_accurate`.
    **options
        The options of the call, `seqused_k` among them.

    Raises
    ------
    AssertionError, TypeError, ValueError, NotImplementedError
        As :func:`assert_attention_accurate` and :func:`reference_attention_varlen` do.

    References
    ----------
    As of :func:`plain_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 17, 2, 8), np.float32)
    >>> cu_seqlens = np.array([0, 5, 17], np.int32)
    >>> out = cuflash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens)
    >>> assert_attention_varlen_accurate(q, k, v, cu_seqlens, cu_seqlens, out)
    """
    assert_attention_accurate(q, k, v, out, lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


def assert_gradients_varlen_accurate(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    /,
    **options: Any,
) -> None:
    """Assert that the gradients of packed sequences are as accurate as they should be.

    Parameters
    ----------
    dout, q, k, v, cu_seqlens_q, cu_seqlens_k : array
        The gradient of the output and the inputs, as in :func:`reference_attention_varlen`.
    dq, dk, dv
        The gradients to judge.
    **options
        The options of the call, `seqused_k` and `dlse` among them, and `dsinks` to judge.

    Raises
    ------
    AssertionError, TypeError, ValueError, NotImplementedError
        As :func:`assert_gradients_accurate` and :func:`reference_attention_varlen` do.

    References
    ----------
    As of :func:`plain_attention`.

    Examples
    --------
    >>> import cuflash, numpy as np
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 17, 2, 8), np.float32)
    >>> cu_seqlens = np.array([0, 5, 17], np.int32)
    >>> out, vjp = cuflash.attention_varlen_vjp(q, k, v, cu_seqlens, cu_seqlens)
    >>> assert_gradients_varlen_accurate(dout, q, k, v, cu_seqlens, cu_seqlens, *vjp(dout))
    """
    options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    assert_gradients_accurate(dout, q, k, v, dq, dk, dv, **options)


def _growth(name: str, factors: dict[str, float]) -> float:
    """Return how a result grows with factors on the arrays, when the scale shrinks so that the scores are as before."""
    if name == "lse":
        return 1.0
    if name == "out":
        return factors["v"]
    if name == "dv":
        return factors["dout"]
    of_scores = factors["dout"] * factors["v"]
    return of_scores / factors[name[1:]] if name in ("dq", "dk") else of_scores


def _rescaled(
    arrays: dict[str, Array], options: Options, factors: dict[str, float], dtype: Any
) -> tuple[dict[str, Array], Options]:
    """Return arrays multiplied by factors, and options that keep the scores, and the rows of their gradient in step."""

    def times(x: Array, factor: float) -> Array:
        return (x.astype(dtype) * factor).astype(x.dtype)

    assert options.scale is not None
    options = options.replace(scale=options.scale / (factors["q"] * factors["k"]))
    if options.dlse is not None:
        options = options.replace(dlse=times(options.dlse, factors["dout"] * factors["v"]))
    return {name: times(x, factors[name]) for name, x in arrays.items()}, options


def _assert_rule(
    compute: Callable[..., Results],
    arrays: dict[str, Any],
    options: Options,
    results: dict[str, Any],
    more_results: dict[str, Any],
) -> None:
    """Hold results that `compute` tells of arrays, in any arithmetic, against the rule; more results may be None."""
    results = results | {name: result for name, result in more_results.items() if result is not None}
    arrays = {name: as_numpy(x) for name, x in arrays.items()}
    _checks.dtype_of(arrays, tuple(_ROUNDING))
    dtype = arrays["q"].dtype
    reference_dtype = np.longdouble if dtype == np.float64 else np.float64
    if np.finfo(reference_dtype).eps >= np.finfo(np.float64).eps and dtype == np.float64:
        raise NotImplementedError(
            "float64 cannot be judged: numpy.longdouble is no longer than float64 on this platform"
        )
    if options.scale is None:
        options = options.replace(scale=1 / math.sqrt(arrays["q"].shape[-1]))
    reference, plain = Arithmetic.reference(reference_dtype), Arithmetic.plain(dtype)

    expected = compute(*arrays.values(), options, reference)
    for name in results:
        if name not in expected:
            raise ValueError(f"{name}: got a gradient to judge, but {name[1:]} is None")
    plain_results = stored(compute(*arrays.values(), options, plain), dtype, options)
    plain_errors = _largest_errors(plain_results, expected)
    if min(x.size for x in expected.values()) < _ENOUGH_ELEMENTS:
        for drawn in np.random.default_rng(0).uniform(0.5, 1, (_REPETITIONS, len(arrays))).tolist():
            factors = dict(zip(arrays, drawn, strict=True))
            copies, own = _rescaled(arrays, options, factors, reference_dtype)
            of_plain = stored(compute(*copies.values(), own, plain), dtype, own)
            for name, error in _largest_errors(of_plain, compute(*copies.values(), own, reference)).items():
                plain_errors[name] = max(plain_errors[name], error / _growth(name, factors))
    terms = compute(*arrays.values(), options, MAGNITUDES)
    for name, result in results.items():
        plain_error = max(plain_errors[name], _WORKING_ROUNDING[dtype.name] * _largest(terms[name]))
        _assert_close(name, as_numpy(result), expected[name], plain_results[name].dtype, plain_error)


def _largest_errors(results: Results, expected: Results) -> dict[str, float]:
    """Return the largest error of each result, where it and what is expected are finite."""
    return {name: float(_errors(results[name], expected[name]).max(initial=0)) for name in expected}


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
