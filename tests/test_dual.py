"""Dual numbers: values as NumPy computes them, derivatives as finite differences have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash._dual import CHOICES, DERIVATIVES, STEPS, Dual
from cuflash.testing import reference_attention

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: (x + 2) + (3 + x) + (x + x),
    "subtract": lambda x: (x - 2) + (3 - x * x) - (x - 2 * x),
    "multiply": lambda x: 2 * x + x * 3 + x * x,
    "divide": lambda x: x / 2 + 3 / x + x / (1 + x * x),
    "power": lambda x: x**2 + x**0.5 + 2.0**x + x**x,
    "negative": lambda x: -x * x,
    "positive": lambda x: +x * x,
    "square": lambda x: np.square(x),
    "reciprocal": lambda x: np.reciprocal(x),
    "sqrt": lambda x: np.sqrt(x),
    "exp": lambda x: np.exp(x),
    "exp2": lambda x: np.exp2(x),
    "expm1": lambda x: np.expm1(x),
    "log": lambda x: np.log(x),
    "log2": lambda x: np.log2(x),
    "log1p": lambda x: np.log1p(x),
    "sin": lambda x: np.sin(x),
    "cos": lambda x: np.cos(x),
    "arctan": lambda x: np.arctan(x),
    "tanh": lambda x: 20 * np.tanh(x / 20),
    "absolute": lambda x: abs(x - 1.2) * x,
    "maximum": lambda x: np.maximum(x, 1.2) + np.maximum(1.7, x * x) + np.maximum(x, x * x),
    "minimum": lambda x: np.minimum(x, 1.2) + np.minimum(1.7, x * x) + np.minimum(x, x * x),
    "fabs": lambda x: np.fabs(x - 1.2) * x,
    "fmax": lambda x: np.fmax(x, 1.2) + np.fmax(np.nan, x * x),
    "fmin": lambda x: np.fmin(x, 1.2) + np.fmin(x * x, np.nan),
    "clip": lambda x: np.clip(x * x, 0.6, 1.9) + np.clip(x, None, 1.1),
    "where": lambda x: np.where(x > 1, x * x, 3 * x) + np.where(x < 0.7, 1.0, x),
    "floor": lambda x: np.floor(3 * x) + x,
    "ceil": lambda x: np.ceil(3 * x) * x,
    "trunc": lambda x: np.trunc(3 * x) * x,
    "rint": lambda x: np.rint(3 * x) * x,
    "sign": lambda x: np.sign(x - 1) * x,
}
POINTS = np.array([0.31, 0.83, 1.03, 1.41, 1.87])  # clear of every kink and step above


def test_every_function_is_tested() -> None:
    assert set(FUNCTIONS) == {*DERIVATIVES, *CHOICES, *STEPS}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_values_and_derivatives(name: str) -> None:
    function, step = FUNCTIONS[name], 1e-6
    result = function(Dual(POINTS, np.full_like(POINTS, 2.0)))
    np.testing.assert_allclose(result.value, function(POINTS), rtol=1e-15)
    difference = (function(POINTS + step) - function(POINTS - step)) / (2 * step)
    np.testing.assert_allclose(np.broadcast_to(result.slope, POINTS.shape), 2 * difference, rtol=2e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_float32_stays_float32(name: str) -> None:
    result = FUNCTIONS[name](Dual(POINTS.astype(np.float32), np.ones(5, np.float32)))
    assert result.dtype == np.float32 and np.asarray(result.slope).dtype == np.float32


def test_where_takes_the_slope_from_the_side_that_it_takes() -> None:
    x: Any = Dual(np.array([-1.0, 4.0]), np.ones(2))
    with np.errstate(invalid="ignore", divide="ignore"):
        result = np.where(x > 0, np.sqrt(x), 0.0)  # the derivative of the other side is NaN
        largest = np.maximum(0 * x - 2, np.where(x > 0, x, np.log(Dual(np.zeros(2)))))
    np.testing.assert_array_equal(result.slope, [0.0, 0.25])
    np.testing.assert_array_equal(largest.slope, [0.0, 1.0])


def test_a_power_of_a_number_below_zero() -> None:
    result = Dual(np.array([-2.0, 0.0])) ** 3  # no logarithm of the base is taken
    np.testing.assert_array_equal(result.slope, [12.0, 0.0])


def test_powers_of_0_and_by_0_are_constant() -> None:
    x: Any = Dual(np.array([0.0, 2.0]))
    for power, value in ((x**0, [1, 1]), (x ** np.array([0, 0]), [1, 1]), (0.0 ** (x + 1), [0, 0])):
        np.testing.assert_array_equal(power.value, value)
        np.testing.assert_array_equal(np.broadcast_to(power.slope, 2), [0, 0])


def test_operators_in_place_act_as_on_arrays() -> None:
    x = same = Dual(np.array([1.0, 2.0]))
    x *= x
    x += 1
    assert same is x
    np.testing.assert_array_equal(x.value, [2.0, 5.0])
    np.testing.assert_array_equal(x.slope, [2.0, 4.0])
    array: Any = np.ones(2)
    with pytest.raises(TypeError, match=r"numpy\.add: out must be a score"):
        array += x


def test_arrays_on_the_left_broadcast() -> None:
    result = np.array([[1.0], [2.0]]) * Dual(np.array([3.0, 4.0]))
    assert result.shape == (2, 2) and result.ndim == 2
    np.testing.assert_array_equal(np.broadcast_to(result.slope, (2, 2)), [[1, 1], [2, 2]])
    assert np.zeros_like(result).tolist() == [[0, 0], [0, 0]]
    assert result.astype(np.float32).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda x: np.arcsinh(x), r"numpy\.arcsinh: has no derivative here; .*absolute, add.*tanh"),
        (lambda x: np.cumsum(x), r"numpy\.cumsum: has no derivative here"),
        (lambda x: np.add.reduce(x), r"numpy\.add: a score_mod can only call it"),
        (lambda x: np.add(x, 1, where=np.array([True, False])), r"numpy\.add: .*where"),
        (lambda x: np.clip(x, 0, 1, out=None), r"numpy\.clip: .* without out"),
        (lambda x: x[0], r"score\[0\]: .*numpy\.where"),
    ],
)
def test_what_has_no_derivative_is_named(call: Any, pattern: str) -> None:
    with pytest.raises(TypeError, match=pattern):
        call(Dual(np.ones(2)))


def test_methods_of_arrays_that_a_score_lacks_are_named() -> None:
    with pytest.raises(AttributeError, match=r"score\.clip: .*clip"):
        Dual(np.ones(2)).clip(0, 1)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="older NumPys know no other names")
def test_clip_by_its_newer_names() -> None:
    x = Dual(POINTS)
    result, same = np.clip(x, min=0.6, max=1.1), np.clip(x, 0.6, 1.1)
    assert result.value.tolist() == same.value.tolist() and result.slope.tolist() == same.slope.tolist()


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["tanh", "multiply", "where", "arctan", "sin"]), min_size=1, max_size=4))
def test_gradients_of_programmed_scores_are_finite_differences(names: list[str]) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for name in names:
            score = FUNCTIONS[name](score) * 0.5
        return score + 0.1 * (q_idx - kv_idx) * (h + 1)

    rng = np.random.default_rng(len(names))
    q, k, v, dout, step = rng.standard_normal((5, 2, 6, 4))
    _, vjp = cuflash.attention_vjp(q, k, v, score_mod=score_mod)
    dq, _, _ = vjp(dout)
    above, below = (cuflash.attention(q + d * step, k, v, score_mod=score_mod) for d in (1e-6, -1e-6))
    np.testing.assert_allclose((dq * step).sum(), ((above - below) * dout).sum() / 2e-6, rtol=1e-6, atol=1e-7)


def test_a_score_mod_without_a_derivative_is_refused_where_gradients_will_be_wanted() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 200, 2, 8))
    offsets = np.array([0, 80, 200], np.int32)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.arcsinh(score)

    cuflash.attention(q, k, v, score_mod=score_mod)
    for call in (
        lambda: cuflash.attention_vjp(q, k, v, score_mod=score_mod),
        lambda: cuflash.attention_varlen_vjp(q, k, v, offsets, offsets, score_mod=score_mod),
    ):
        with pytest.raises(TypeError, match=r"^numpy\.arcsinh: has no derivative"):
            call()


def test_asking_for_a_derivative_changes_no_score() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 200, 8))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        score += 0.125 * (q_idx - kv_idx)  # in place
        return np.maximum(score, 0.0)

    out, vjp = cuflash.attention_vjp(q, k, v, score_mod=score_mod)
    np.testing.assert_array_equal(out, cuflash.attention(q, k, v, score_mod=score_mod))
    assert len(vjp(out)) == 3


def test_what_makes_another_array_of_a_score_is_refused() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 20, 8))
    for another in (np.asarray, np.array):
        with pytest.raises(TypeError, match="score: a score_mod cannot make another array of it"):
            cuflash.attention_vjp(q, k, v, score_mod=lambda score, b, h, i, j, f=another: f(score) + j)


def test_indices_are_not_for_writing() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 20, 8))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kv_idx *= 2
        return score - 0.05 * kv_idx

    for call in (cuflash.attention, cuflash.attention_vjp, reference_attention):
        with pytest.raises(ValueError, match="read-only"):
            call(q, k, v, score_mod=score_mod)
    with pytest.raises(ValueError, match="read-only"):
        cuflash.make_block_mask(mask_mod=score_mod, shape=(1, 1, 300, 300))


def test_a_score_mod_takes_all_it_is_given() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 20, 8))
    with pytest.raises(TypeError, match=r"score_mod: got .* it must take 5 arguments"):
        cuflash.attention_vjp(q, k, v, score_mod=lambda score: score)
