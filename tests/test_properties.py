"""Properties of attention that need no reference, on every ring.

Where rounding differs, the result of one call is held against the accuracy rule of the problem that it should
also be the result of; where it must not differ, bits are compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem
from tests.conftest import Ring

SHAPES = ((2, 4, 65, 32), (2, 2, 70, 32), (2, 2, 70, 32))
SAME_LENGTH = ((2, 4, 65, 32), (2, 2, 65, 32), (2, 2, 65, 32))


def forward(ring: Ring, *arrays: Any, **options: Any) -> tuple[Any, Any]:
    """Return `out` and `lse` as NumPy arrays, of NumPy arrays."""
    out, lse = ring.attention(*map(ring.asarray, arrays), return_lse=True, **options)
    return ring.numpy(out), ring.numpy(lse)


def backward(ring: Ring, dout: Any, *arrays: Any, **options: Any) -> list[Any]:
    _, vjp = ring.attention_vjp(*map(ring.asarray, arrays), **options, deterministic=True)
    return [ring.numpy(x) for x in vjp(ring.asarray(dout))]


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """Merge the attention over two sets of keys, by the weight that each has."""
    lse = np.logaddexp(lse_a, lse_b)
    seen = np.where(np.isneginf(lse), 0, lse)
    return out_a * np.exp(lse_a - seen)[..., None] + out_b * np.exp(lse_b - seen)[..., None], lse


@pytest.mark.thorough_on_wmma
def test_the_order_of_keys_does_not_matter(ring: Ring) -> None:
    for dtype in ring.dtypes[:3]:
        problem = AttentionProblem(*SHAPES, dtype)
        (q, k, v), dout = problem.arrays(), problem.dout()
        order = np.random.default_rng(1).permutation(k.shape[2])
        assert_attention_accurate(q, k, v, *forward(ring, q, k[:, :, order], v[:, :, order]))
        dq, dk, dv = backward(ring, dout, q, k[:, :, order], v[:, :, order])
        original = np.argsort(order)
        assert_gradients_accurate(dout, q, k, v, dq, dk[:, :, original], dv[:, :, original])


def test_parts_of_the_keys_merge_by_their_lse(ring: Ring) -> None:
    q, k, v = AttentionProblem(*SHAPES).arrays()
    whole = dataclasses.replace(AttentionProblem(*SHAPES), causal="top-left")
    for split in (1, 33, 64, 69):
        parts = [forward(ring, q, k[:, :, part], v[:, :, part]) for part in (slice(split), slice(split, None))]
        out, lse = merge(*parts[0], *parts[1])
        assert_attention_accurate(q, k, v, out, lse)
    # Of the second part, the first rows see nothing: their lse of -inf gives them no weight.
    first = forward(ring, q, k[:, :, :33], v[:, :, :33], causal="top-left")
    second = forward(ring, q, k[:, :, 33:65], v[:, :, 33:65], causal=True)
    out, lse = merge(*first, *second)
    assert_attention_accurate(q, k[:, :, :65], v[:, :, :65], out, lse, **whole.options)


@pytest.mark.thorough_on_wmma
def test_a_batch_entry_does_not_depend_on_the_others(ring: Ring) -> None:
    for dtype in ring.dtypes:
        problem = AttentionProblem((3, 4, 65, 32), (3, 2, 70, 32), (3, 2, 70, 32), dtype, causal=True)
        arrays, dout = problem.arrays(), problem.dout()
        results = (*forward(ring, *arrays, causal=True), *backward(ring, dout, *arrays, causal=True))
        for i in range(3):
            entry = [x[i : i + 1] for x in (dout, *arrays)]
            alone = (*forward(ring, *entry[1:], causal=True), *backward(ring, *entry, causal=True))
            for result, expected in zip(results, alone, strict=True):
                ring.assert_same_bits(result[i : i + 1], expected)


def test_causal_rows_do_not_depend_on_what_follows(ring: Ring) -> None:
    q, k, v = AttentionProblem(*SAME_LENGTH).arrays()
    out, lse = forward(ring, q, k, v, causal=True)
    for length in (1, 16, 33, 64):
        prefix = [x[:, :, :length] for x in (q, k, v)]
        assert_attention_accurate(*prefix, out[:, :, :length], lse[:, :, :length], causal=True)
    changed = [np.concatenate([x[:, :, :40], 2 - x[:, :, 40:]], axis=2) for x in (q, k, v)]
    other, other_lse = forward(ring, *changed, causal=True)
    ring.assert_same_bits(other[:, :, :40], out[:, :, :40])
    ring.assert_same_bits(other_lse[:, :, :40], lse[:, :, :40])
    assert (other[:, :, 40:] != out[:, :, 40:]).any(axis=-1).all()


def test_grouped_heads_are_repeated_key_value_heads(ring: Ring) -> None:
    for dtype in ring.dtypes[:3]:
        problem = AttentionProblem((2, 6, 33, 32), (2, 2, 40, 32), (2, 2, 40, 32), dtype)
        (q, k, v), dout = problem.arrays(), problem.dout()
        repeated = [np.repeat(x, 3, axis=1) for x in (k, v)]
        assert_attention_accurate(q, *repeated, *forward(ring, q, k, v))
        assert_attention_accurate(q, k, v, *forward(ring, q, *repeated))
        _, dk, dv = backward(ring, dout, q, k, v)
        dq_repeated, *_ = backward(ring, dout, q, *repeated)
        assert_gradients_accurate(dout, q, k, v, dq_repeated, dk, dv)


def test_a_shift_of_a_rows_scores_moves_only_its_lse(ring: Ring) -> None:
    # All values are multiples of 1/4 below 16, so that adding to the keys is exact in every dtype.
    for dtype in ring.dtypes[:3]:
        q, k, v = (np.round(4 * x.astype(np.float32)) / 4 for x in AttentionProblem(*SHAPES, dtype).arrays())
        shift = np.random.default_rng(2).integers(-3, 4, k.shape[-1])
        moved = (k + shift).astype(dtype)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        scale = 0.125
        out, lse = forward(ring, q, k, v, scale=scale)
        lse = (lse + scale * (q.astype(np.float64) @ shift)).astype(lse.dtype)
        assert_attention_accurate(q, moved, v, out, lse, scale=scale)
        _, lse_moved = forward(ring, q, moved, v, scale=scale)
        assert np.abs(lse_moved - lse).max() < 1e-4 < np.abs(lse_moved).max()


def test_a_window_is_a_mask(ring: Ring) -> None:
    # Keys outside of the window, gathered away by hand, row by row.
    q, k, v = AttentionProblem(*SAME_LENGTH).arrays()
    for left, right in ((5, 3), (20, None), (None, 2)):
        out, lse = forward(ring, q, k, v, window_size=(left, right))
        for i in (0, 4, 30, 63, 64):
            first = 0 if left is None else max(0, i - left)
            seen = slice(first, None if right is None else i + right + 1)
            row = slice(i, i + 1)
            kv = k[:, :, seen], v[:, :, seen]
            assert_attention_accurate(q[:, :, row], *kv, out[:, :, row], lse[:, :, row])


@pytest.mark.parametrize("poison", [np.nan, 1e4])
def test_keys_that_nobody_sees_are_inert(ring: Ring, poison: float) -> None:
    for dtype in ring.dtypes:
        problem = AttentionProblem((2, 4, 40, 32), (2, 2, 100, 32), (2, 2, 100, 32), dtype, causal="top-left")
        arrays, dout = problem.arrays(), problem.dout()
        options = {"causal": "top-left", "window_size": (10, None)}
        clean = (*forward(ring, *arrays, **options), *backward(ring, dout, *arrays, **options))
        for x in arrays[1:]:
            x[:, :, 40:] = poison
        poisoned = (*forward(ring, *arrays, **options), *backward(ring, dout, *arrays, **options))
        for result, expected in zip(poisoned, clean, strict=True):
            ring.assert_untouched(result, expected, poison)
        ring.assert_same_bits(poisoned[1], clean[1])  # lse
        assert (poisoned[3][:, :, 40:] == 0).all()
        assert (poisoned[4][:, :, 40:] == 0).all()


@pytest.mark.thorough_on_wmma
def test_a_key_reaches_only_the_rows_that_see_it(ring: Ring) -> None:
    for dtype in ring.dtypes:
        for options in ({"causal": True}, {"window_size": (7, 4)}):
            problem = AttentionProblem(*SAME_LENGTH, dtype)
            clean, dout = problem.arrays(), problem.dout()
            out, lse = forward(ring, *clean, **options)
            dq, *_ = backward(ring, dout, *clean, **options)
            rows = np.arange(65)
            last = 64 if "causal" in options else 30 + 7
            first = 30 if "causal" in options else 30 - 4
            seeing = (first <= rows) & (rows <= last)
            for index in (1, 2):
                arrays = [x.copy() for x in clean]
                arrays[index][:, :, 30] = np.nan
                out_nan, lse_nan = forward(ring, *arrays, **options)
                dq_nan, *_ = backward(ring, dout, *arrays, **options)
                assert np.isnan(out_nan[:, :, seeing]).all()
                assert np.isnan(dq_nan[:, :, seeing]).all()
                for result, expected in ((out_nan, out), (dq_nan, dq)):
                    ring.assert_untouched(result[:, :, ~seeing], expected[:, :, ~seeing], np.nan)
                ring.assert_same_bits(lse_nan[:, :, ~seeing], lse[:, :, ~seeing])


def test_the_vjp_is_linear(ring: Ring) -> None:
    problem = AttentionProblem(*SHAPES, causal=True)
    arrays = problem.arrays(ring.xp)
    _, vjp = ring.attention_vjp(*arrays, causal=True)
    # Multiples of 1/16: their sum, and twice them, are exact.
    a, b = (np.round(16 * dataclasses.replace(problem, seed=seed).dout()) / np.float32(16) for seed in (1, 2))
    of_a, of_b, of_2a = ([ring.numpy(x) for x in vjp(ring.asarray(dout))] for dout in (a, b, 2 * a))
    for twice, once in zip(of_2a, of_a, strict=True):
        ring.assert_same_bits(twice, 2 * once)
    sums = [x + y for x, y in zip(of_a, of_b, strict=True)]
    assert_gradients_accurate(a + b, *problem.arrays(), *sums, causal=True)


def test_gradients_of_query_and_key_hang_together(ring: Ring) -> None:
    """Scaling q by c and k by 1/c changes nothing, so the gradients agree along that direction."""
    problem = AttentionProblem(*SHAPES)
    q, k, _ = (x.astype(np.float64) for x in problem.arrays())
    dq, dk, _ = backward(ring, problem.dout(), *problem.arrays())
    along_q, along_k = (q * dq).sum(axis=(1, 2, 3)), (k * dk).sum(axis=(1, 2, 3))
    size = np.abs(q * dq).sum(axis=(1, 2, 3))
    assert (np.abs(along_q - along_k) <= 1e-6 * size).all()


def test_the_same_call_gives_the_same_bits(ring: Ring) -> None:
    for dtype in ring.dtypes:
        problem = AttentionProblem(*SHAPES, dtype, causal=True)
        results = []
        for _ in range(3):
            arrays, dout = problem.arrays(), problem.dout()
            results.append((*forward(ring, *arrays, causal=True), *backward(ring, dout, *arrays, causal=True)))
        for again in results[1:]:
            for result, expected in zip(again, results[0], strict=True):
                ring.assert_same_bits(result, expected)
