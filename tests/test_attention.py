"""The forward pass, by its contract, on every ring."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import numpy as np
import pytest

from cuflash import _sm80
from cuflash.testing import assert_attention_accurate
from cuflash.testing.strategies import STRIDES, AttentionProblem
from tests.conftest import Ring

CAUSALS = (False, True, "top-left")


def test_random_problems_are_accurate(ring: Ring) -> None:
    @ring.given()
    def check(problem: AttentionProblem) -> None:
        q, k, v = problem.arrays(ring.xp)
        out, lse = ring.attention(q, k, v, return_lse=True, **problem.options)
        assert out.shape == problem.out_shape
        assert_attention_accurate(q, k, v, out, lse, **problem.options)
        ring.assert_same_bits(ring.attention(q, k, v, **problem.options), out)

    check()


def test_every_head_dim_is_accurate(ring: Ring) -> None:
    for head_dim, head_dim_v in ring.head_dim_pairs:
        for dtype in ring.dtypes if ring.name == "gpu" else ("float16", "float32"):
            q, k, v = (2, 2, 66, head_dim), (2, 1, 70, head_dim), (2, 1, 70, head_dim_v)
            ring.check_forward(AttentionProblem(q, k, v, dtype, causal=True))


@pytest.mark.parametrize("kept_q", [16, 48, 64])
def test_any_part_of_q_may_stay_in_registers(ring: Ring, kept_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in _sm80.FORWARD_TILES if key[:2] == (64, 64)]:
        monkeypatch.setitem(_sm80.FORWARD_TILES, key, (_sm80.Tile(64, 64, 4, 1, kept_q),))
    rows = 100 + kept_q  # of which no plan is kept
    ring.check_forward(AttentionProblem((2, rows, 64), (2, 150, 64), (2, 150, 64), "float16", causal=True))


@pytest.mark.parametrize("causal", CAUSALS)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(1, 1), (1, 1000), (17, 63), (63, 17), (65, 1), (1000, 65), (1000, 1000)]
)
def test_every_length_is_accurate(ring: Ring, seqlen_q: int, seqlen_k: int, causal: Any) -> None:
    seqlen_q, seqlen_k = min(seqlen_q, ring.long_seqlen), min(seqlen_k, ring.long_seqlen)
    q, kv = (seqlen_q, 32), (seqlen_k, 32)
    for dtype in ("float16", "float32"):
        ring.check_forward(AttentionProblem(q, kv, kv, dtype, causal=causal))


def test_the_lse_of_a_lone_key_is_its_score(ring: Ring) -> None:
    """Row by row, but for a few roundings: the softmax of one number adds none. Parts of wmma's float32 lack bits."""
    of_parts = {"float32"} if ring.kernel == "wmma" else set()
    for dtype, head_dim in product(set(ring.dtypes) & {"float16", "bfloat16", "float32"} - of_parts, (1, 8)):
        q_shape, kv_shape = (1, 4096, head_dim), (1, 1, head_dim)
        problem = AttentionProblem(q_shape, kv_shape, kv_shape, dtype, scale=1 / 7)
        _, lse = ring.attention(*problem.arrays(ring.xp), return_lse=True, **problem.options)
        q, k, _ = (x[0].astype(np.float64) for x in problem.arrays())
        score, terms = q @ k[0] / 7, np.abs(q) @ np.abs(k[0]) / 7
        np.testing.assert_array_less(np.abs(ring.numpy(lse)[0] - score), 2.0**-24 * (2 * terms + 2 * np.abs(score)))


@pytest.mark.parametrize("causal", CAUSALS)
@pytest.mark.parametrize("window", [(0, 0), (0, None), (None, 0), (5, 3), (70, 1), (1, 70), (200, 200), (None, None)])
def test_every_window_is_accurate(ring: Ring, window: Any, causal: Any) -> None:
    for seqlen_q, seqlen_k in ((100, 100), (40, 130), (130, 40)):
        q, kv = (seqlen_q, 8), (seqlen_k, 8)
        ring.check_forward(AttentionProblem(q, kv, kv, causal=causal, window_size=window))


def test_float64_is_accurate() -> None:
    from tests.conftest import numpy_ring

    ring = numpy_ring()

    @ring.given(dtypes=["float64"], max_seqlen=33)
    def check(problem: AttentionProblem) -> None:
        ring.check_forward(problem)
        ring.check_backward(problem)

    check()


def test_large_scores_do_not_overflow(ring: Ring) -> None:
    problem = AttentionProblem((2, 65, 32), (2, 65, 32), (2, 65, 32), "float16")
    q, k, v = problem.arrays()
    q = q * np.float16(100)  # scores of several hundred: their exponentials are beyond float32
    out, lse = ring.attention(*map(ring.asarray, (q, k, v)), return_lse=True)
    assert np.abs(ring.numpy(lse)).max() > 200
    assert_attention_accurate(q, k, v, out, lse)


@pytest.mark.parametrize(
    ("q", "kv"),
    [
        ((0, 8), (5, 8)),
        ((5, 8), (0, 8)),
        ((0, 8), (0, 8)),
        ((2, 3, 5, 8), (2, 3, 0, 8)),
        ((0, 3, 5, 8), (0, 3, 4, 8)),
    ],
)
def test_empty_arrays(ring: Ring, q: tuple[int, ...], kv: tuple[int, ...]) -> None:
    for causal in CAUSALS:
        problem = AttentionProblem(q, kv, kv, causal=causal)
        out, lse = ring.attention(*problem.arrays(ring.xp), return_lse=True, causal=causal)
        assert out.shape == q
        assert lse.shape == q[:-1]
        assert (ring.numpy(out) == 0).all()
        assert np.isneginf(ring.numpy(lse)).all()


def test_rows_that_see_no_key_are_zero(ring: Ring) -> None:
    for dtype in ring.dtypes:
        problem = AttentionProblem((2, 100, 8), (2, 30, 8), (2, 30, 8), dtype, causal=True)
        out, lse = ring.attention(*problem.arrays(ring.xp), return_lse=True, causal=True)
        assert (ring.numpy(out)[:, :70] == 0).all()
        assert np.isneginf(ring.numpy(lse)[:, :70]).all()
        assert (ring.numpy(out)[:, 70:] != 0).any(axis=-1).all()
        assert np.isfinite(ring.numpy(lse)[:, 70:]).all()


def test_lse_is_a_natural_logarithm_in_float32(ring: Ring) -> None:
    for dtype in ring.dtypes:
        q, k, v = AttentionProblem((3, 5, 8), (3, 7, 8), (3, 7, 8), dtype).arrays()
        _, lse = ring.attention(*map(ring.asarray, (np.zeros_like(q), k, v)), return_lse=True)
        assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
        np.testing.assert_allclose(ring.numpy(lse), np.log(7), rtol=1e-6)


def test_lse_has_heads_before_the_sequence_in_every_layout(ring: Ring) -> None:
    problem = AttentionProblem((2, 17, 4, 8), (2, 33, 2, 8), (2, 33, 2, 8), layout="bshd")
    out, lse = ring.attention(*problem.arrays(ring.xp), layout="bshd", return_lse=True)
    assert out.shape == (2, 17, 4, 8)
    assert lse.shape == (2, 4, 17)


def test_layouts_agree_to_the_bit(ring: Ring) -> None:
    for ndim in (3, 4):
        shapes = [shape[-ndim:] for shape in ((2, 17, 4, 8), (2, 33, 2, 8), (2, 33, 2, 16))]
        q, k, v = AttentionProblem(*shapes, layout="bshd").arrays(ring.xp)
        out, lse = ring.attention(q, k, v, layout="bshd", causal=True, return_lse=True)
        same, same_lse = ring.attention(*(x.swapaxes(-2, -3) for x in (q, k, v)), causal=True, return_lse=True)
        ring.assert_same_bits(out, same.swapaxes(-2, -3))
        ring.assert_same_bits(lse, same_lse)


def test_bottom_right_is_a_name_for_true(ring: Ring) -> None:
    arrays = AttentionProblem((17, 8), (40, 8), (40, 8)).arrays(ring.xp)
    out = ring.attention(*arrays, causal="bottom-right")
    ring.assert_same_bits(out, ring.attention(*arrays, causal=True))
    assert (ring.numpy(out) != ring.numpy(ring.attention(*arrays, causal="top-left"))).any()


def test_default_scale(ring: Ring) -> None:
    arrays = AttentionProblem((17, 16), (40, 16), (40, 16)).arrays(ring.xp)
    ring.assert_same_bits(ring.attention(*arrays), ring.attention(*arrays, scale=0.25))
    assert (ring.numpy(ring.attention(*arrays)) != ring.numpy(ring.attention(*arrays, scale=0.26))).any()


@pytest.mark.parametrize("scale", [0.0, -0.25, 4.0, np.float32(0.5), 1])
def test_any_finite_scale(ring: Ring, scale: Any) -> None:
    ring.check_forward(AttentionProblem((2, 17, 8), (2, 40, 8), (2, 40, 8), scale=scale, causal=True))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((3, 4, 17, 8), (1, 2, 33, 8), (3, 2, 33, 8)),
        ((1, 4, 17, 8), (3, 2, 33, 8), (1, 2, 33, 8)),
        ((4, 17, 8), (3, 2, 33, 8), (2, 33, 8)),
        ((3, 4, 17, 8), (33, 8), (33, 8)),
        ((17, 8), (1, 33, 8), (3, 1, 33, 8)),
        ((17, 8), (33, 8), (3, 1, 33, 8)),
    ],
)
def test_batch_axes_broadcast(ring: Ring, q: Any, k: Any, v: Any) -> None:
    problem = AttentionProblem(q, k, v)
    arrays = problem.arrays(ring.xp)
    out, lse = ring.attention(*arrays, return_lse=True)
    assert out.shape == problem.out_shape
    full = [ring.xp.broadcast_to(x, (3, *(1,) * (3 - x.ndim), *x.shape[-3:])) for x in arrays]
    same, same_lse = ring.attention(*full, return_lse=True)
    ring.assert_same_bits(out, same)
    ring.assert_same_bits(lse, same_lse)
    assert_attention_accurate(*arrays, out, lse)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strides_do_not_change_a_bit(ring: Ring, strides: Any, dtype: str) -> None:
    contiguous = AttentionProblem((2, 4, 65, 32), (2, 2, 70, 32), (2, 2, 70, 32), dtype, causal=True)
    problem = dataclasses.replace(contiguous, strides=(strides,) * 4)
    arrays = problem.arrays(ring.xp)
    copies = [ring.xp.ascontiguousarray(x) for x in arrays]
    out, lse = ring.attention(*arrays, causal=True, return_lse=True)
    if ring.may_take_tuned_kernels:  # some strides go to other kernels
        assert_attention_accurate(*arrays, out, lse, causal=True)
        return
    same, same_lse = ring.attention(*copies, causal=True, return_lse=True)
    ring.assert_same_bits(out, same)
    ring.assert_same_bits(lse, same_lse)


@pytest.mark.parametrize("axis", range(4))
def test_a_stride_of_zero_along_any_axis(ring: Ring, axis: int) -> None:
    shapes = ((2, 2, 65, 8), (2, 2, 70, 8), (2, 2, 70, 8))
    arrays = AttentionProblem(*shapes, "float16").arrays(ring.xp)
    views = [ring.xp.broadcast_to(x[(slice(None),) * axis + (slice(1),)], x.shape) for x in arrays]
    assert all(x.strides[axis] == 0 for x in views)
    out, lse = ring.attention(*views, return_lse=True)
    if ring.may_take_tuned_kernels and axis == 3:  # TMA takes no such columns: another kernel computes this
        assert_attention_accurate(*views, out, lse)
    else:
        ring.assert_same_bits(out, ring.attention(*map(ring.xp.ascontiguousarray, views)))


def test_out_is_written_and_returned(ring: Ring) -> None:
    arrays = AttentionProblem((2, 4, 17, 8), (2, 2, 33, 8), (2, 2, 33, 8)).arrays(ring.xp)
    out = ring.xp.full((2, 4, 17, 8), np.nan, np.float32)
    assert ring.attention(*arrays, out=out) is out
    ring.assert_same_bits(out, ring.attention(*arrays))
    result, lse = ring.attention(*arrays, out=out, return_lse=True)
    assert result is out
    assert lse.shape == (2, 4, 17)


@pytest.mark.parametrize("strides", ["transposed", "negative", "sliced"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out_of_any_strides_and_nothing_around_it(ring: Ring, strides: str, dtype: str) -> None:
    arrays = AttentionProblem((2, 4, 66, 9), (2, 2, 33, 9), (2, 2, 33, 9), dtype).arrays(ring.xp)
    parent = ring.xp.full((3, 6, 70, 70), 7, dtype)
    out = {
        "transposed": parent[:2, 1:5, 2:11, 3:69].swapaxes(-1, -2),
        "negative": parent[1:, 4:0:-1, 67:1:-1, 20:2:-2],
        "sliced": parent[:2, 1:5, 2:68, 3:21:2],
    }[strides]
    assert ring.attention(*arrays, out=out) is out
    ring.assert_same_bits(out, ring.attention(*arrays))
    out[...] = 7
    assert (ring.numpy(parent) == 7).all()


def test_nothing_around_the_inputs_is_read_and_they_are_not_written(ring: Ring) -> None:
    for dtype in ("float16", "float32"):
        clean = AttentionProblem((2, 2, 33, 17), (2, 2, 41, 17), (2, 2, 41, 17), dtype).arrays()
        parents = [np.full((4, 4, x.shape[2] + 6, 25), np.nan, dtype) for x in clean]
        for parent, x in zip(parents, clean, strict=True):
            parent[1:3, 1:3, 3:-3, 3:20] = x
        poisoned = [ring.xp.asarray(parent) for parent in parents]
        views = [parent[1:3, 1:3, 3:-3, 3:20] for parent in poisoned]
        out, lse = ring.attention(*views, causal=True, return_lse=True)
        same, same_lse = ring.attention(*map(ring.asarray, clean), causal=True, return_lse=True)
        ring.assert_same_bits(out, same)
        ring.assert_same_bits(lse, same_lse)
        for before, after in zip(parents, poisoned, strict=True):
            ring.assert_same_bits(after, before)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_spread_as_in_the_reference(ring: Ring, name: str, value: float) -> None:
    for dtype in ("float16", "float32"):
        for options in ({}, {"causal": True}, {"window_size": (3, 2)}):
            arrays = dict(zip("qkv", AttentionProblem((2, 40, 8), (2, 70, 8), (2, 70, 8), dtype).arrays(), strict=True))
            arrays[name][0, 35, 3] = value
            q, k, v = arrays.values()
            out, lse = ring.attention(*map(ring.asarray, arrays.values()), return_lse=True, **options)
            assert_attention_accurate(q, k, v, out, lse, **options)
            assert np.isfinite(ring.numpy(out)[1]).all()


def test_infinity_beside_round_numbers_is_no_nan(ring: Ring) -> None:
    """Where a number is taken apart, a part may be 0, and 0 * infinity is NaN; 128 keys: a tile with nothing hidden."""
    for dtype in set(ring.dtypes) & {"float16", "float32"}:
        for name, value in (("q", np.inf), ("k", -np.inf), ("v", np.inf)):
            arrays = {"q": np.zeros((64, 8), dtype), "k": -np.ones((128, 8), dtype), "v": np.ones((128, 8), dtype)}
            if name != "v":  # else scores are 0, and weights 1
                arrays["q"][...] = 1
            arrays[name][35, 3] = value
            q, k, v = arrays.values()
            out, lse = ring.attention(*map(ring.asarray, arrays.values()), return_lse=True)
            assert_attention_accurate(q, k, v, out, lse)
