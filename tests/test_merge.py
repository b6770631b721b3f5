"""Attention over parts of the keys, put together, is attention over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem

DTYPES = ("float16", "bfloat16", "float32", "float64")
many = settings(max_examples=60, derandomize=True, deadline=None)


def split(problem: AttentionProblem, cut: int) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return the queries, and the keys and values before and after the cut."""
    q, k, v = problem.arrays()
    axis = -3 if problem.layout == "bshd" and k.ndim > 2 else -2
    return q, [
        (np.take(k, piece, axis), np.take(v, piece, axis)) for piece in np.split(np.arange(k.shape[axis]), [cut])
    ]


@many
@given(st.data())
def test_parts_merge_to_the_whole(data: st.DataObject) -> None:
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["bhsd", "bshd"]))
    rank, cut = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 30))
    heads = (3,) if rank > 2 else ()

    def shape(seqlen: int) -> tuple[int, ...]:
        rows = (*heads, seqlen) if layout == "bhsd" else (seqlen, *heads)
        return (*(2,) * (rank - 3), *rows, 8)

    problem = AttentionProblem(shape(17), shape(30), shape(30), dtype, layout=layout, seed=cut)
    q, parts = split(problem, cut)
    states = [cuflash.attention(q, k, v, layout=layout, return_lse=True) for k, v in parts]
    out, lse = cuflash.merge_states(*states[0], *states[1], layout=layout)
    # Parts in float16 are rounded once more than the whole: the rule is for what is computed in one go.
    if dtype in ("float32", "float64"):
        assert_attention_accurate(*problem.arrays(), out, lse, layout=layout)
        return
    whole, whole_lse = cuflash.attention(*problem.arrays(), layout=layout, return_lse=True)
    rounding = 2**-10 if dtype == "float16" else 2**-7
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)
    difference = np.abs(out.astype(float) - whole.astype(float))
    assert difference.max() <= 2 * rounding * max(1, np.abs(whole.astype(float)).max())
    assert out.dtype == q.dtype


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("cut", [0, 13, 30])
def test_gradients_flow_through_the_parts(layout: Any, with_dlse: bool, cut: int) -> None:
    shapes = ((2, 3, 17, 8), (2, 3, 30, 8), (2, 3, 30, 5))
    if layout == "bshd":
        shapes = tuple((b, s, h, d) for b, h, s, d in shapes)  # type: ignore[assignment]
    problem = AttentionProblem(*shapes, layout=layout, with_dlse=with_dlse)
    q, parts = split(problem, cut)
    calls = [cuflash.attention_vjp(q, k, v, layout=layout, return_lse=True) for k, v in parts]
    states = [x for state, _ in calls for x in state]
    gradients = cuflash.merge_states_backward(problem.dout(), problem.dlse(), *states, layout=layout)
    dq_a, dk_a, dv_a = calls[0][1](*gradients[:2])
    dq_b, dk_b, dv_b = calls[1][1](*gradients[2:])
    axis = -3 if layout == "bshd" else -2
    whole = dq_a + dq_b, np.concatenate([dk_a, dk_b], axis), np.concatenate([dv_a, dv_b], axis)
    assert_gradients_accurate(problem.dout(), *problem.arrays(), *whole, dlse=problem.dlse(), layout=layout)


def random_states(seed: int, count: int) -> list[tuple[Any, Any]]:
    """States of 40 rows in float64, of which some have seen no key."""
    rng = np.random.default_rng(seed)
    states = []
    for _ in range(count):
        lse = np.where(rng.random(40) < 0.3, -np.inf, 30 * rng.standard_normal(40))
        states.append((np.where(np.isneginf(lse)[:, None], 0, rng.standard_normal((40, 3))), lse))
    return states


def assert_same_state(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


@many
@given(st.integers(0, 2**32))
def test_the_order_does_not_matter(seed: int) -> None:
    a, b, c = random_states(seed, 3)
    assert_same_state(cuflash.merge_states(*a, *b), cuflash.merge_states(*b, *a))
    left = cuflash.merge_states(*cuflash.merge_states(*a, *b), *c)
    assert_same_state(left, cuflash.merge_states(*a, *cuflash.merge_states(*b, *c)))
    empty = (np.zeros_like(a[0]), np.full_like(a[1], -np.inf))
    assert_same_state(cuflash.merge_states(*a, *empty), a)


@many
@given(st.integers(0, 2**32))
def test_gradients_are_finite_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (out_a, lse_a), (out_b, lse_b) = random_states(seed, 2)
    lse_a, lse_b = lse_a / 20, lse_b / 20
    dout, dlse = rng.standard_normal((40, 3)), rng.standard_normal(40)
    gradients = cuflash.merge_states_backward(dout, dlse, out_a, lse_a, out_b, lse_b)
    steps = [rng.standard_normal(x.shape) for x in gradients]

    def value(distance: float) -> float:
        inputs = (out_a, lse_a, out_b, lse_b)
        moved = [x + distance * step for x, step in zip(inputs, steps, strict=True)]
        out, lse = cuflash.merge_states(*moved)
        return float((out * dout).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum())

    expected = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
    np.testing.assert_allclose((value(1e-6) - value(-1e-6)) / 2e-6, expected, rtol=1e-6, atol=1e-6)


def test_a_state_that_saw_no_key_does_not_count_whatever_it_holds() -> None:
    out_a, dout = np.ones((2, 4, 8), np.float32), np.ones((2, 4, 8), np.float32)
    lse_a = np.full((2, 4), 3.0, np.float32)
    out_b, lse_b = np.full_like(out_a, np.nan), np.full_like(lse_a, -np.inf)
    lse_a[:, 0] = -np.inf
    with np.errstate(all="raise"):
        out, lse = cuflash.merge_states(out_a, lse_a, out_b, lse_b)
        gradients = cuflash.merge_states_backward(dout, np.ones_like(lse), out_a, lse_a, out_b, lse_b)
    np.testing.assert_array_equal(out[:, 1:], 1)
    np.testing.assert_array_equal(out[:, 0], 0)
    np.testing.assert_array_equal(lse, lse_a)
    dout_a, dlse_a, dout_b, dlse_b = gradients
    assert (dout_a[:, 1:] == 1).all() and (dlse_a[:, 1:] == 1).all()
    for gradient in (dout_a[:, 0], dlse_a[:, 0], dout_b, dlse_b):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dlse", [-np.inf, np.nan])
def test_a_gradient_of_an_lse_of_no_key_does_not_count(dlse: float) -> None:
    states = np.ones((1, 8)), np.array([3.0]), np.ones((1, 8)), np.array([-np.inf])
    unseen = states[2:] * 2
    _, dlse_a, _, dlse_b = cuflash.merge_states_backward(np.ones((1, 8)), np.array([dlse]), *unseen)
    assert dlse_a == dlse_b == 0
    _, dlse_a, _, dlse_b = cuflash.merge_states_backward(np.ones((1, 8)), np.array([dlse]), *states)
    np.testing.assert_array_equal(dlse_a, dlse)
    assert dlse_b == 0


def test_large_logits_do_not_overflow() -> None:
    out_a, out_b = np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32)
    lse = np.array([1e4], np.float32)
    out, merged = cuflash.merge_states(out_a, lse, out_b, lse)
    np.testing.assert_array_equal(out, 0.5)
    np.testing.assert_allclose(merged, 1e4 + np.log(2), rtol=1e-6)


OUT, LSE = np.zeros((2, 4, 8), np.float16), np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("states", "options", "error", "pattern"),
    [
        ((OUT, LSE, OUT.astype(np.float32), LSE), {}, TypeError, "out_b: dtype float32 differs from out_a's float16"),
        ((OUT, LSE.astype(np.float64), OUT, LSE), {}, TypeError, "lse_a: dtype float64.*float32"),
        ((OUT, LSE, OUT[:, :3], LSE), {}, ValueError, r"out_b: shape is \(2, 3, 8\); it must be \(2, 4, 8\)"),
        ((OUT, LSE, OUT, LSE.T.copy()), {}, ValueError, r"lse_b: shape is \(4, 2\); it must be \(2, 4\)"),
        ((OUT, LSE, OUT, LSE), {"layout": "bshd"}, ValueError, r"lse_a: shape is \(2, 4\); it must be \(4, 2\)"),
        ((OUT, LSE, OUT, LSE), {"layout": "sbhd"}, ValueError, "layout: got 'sbhd'"),
        ((OUT[0, 0], LSE, OUT[0, 0], LSE), {}, ValueError, r"out_a: shape is \(8,\)"),
        ((OUT, LSE, OUT, LSE.tolist()), {}, TypeError, "lse_b: got a builtins.list"),
    ],
)
def test_wrong_arguments_are_named(states: Any, options: Any, error: Any, pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        cuflash.merge_states(*states, **options)
    with pytest.raises(error, match=pattern):
        cuflash.merge_states_backward(OUT, None, *states, **options)
