"""The variants of attention: each by itself and in combinations, forward and backward, on every ring."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _dbias
from cuflash._device import Chip
from cuflash._launch import LaunchBackend
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.mods import MASK_MODS, SCORE_MODS
from cuflash.testing.strategies import PAIR_STRIDES, VARIANTS, AttentionProblem, PairArray
from tests.conftest import Ring, host_ring
from tests.hostcuda import HostDevice

# Grouped heads, lengths that are no multiples of a tile, values of another head dimension.
GROUPED = AttentionProblem((2, 4, 40, 32), (2, 2, 70, 32), (2, 2, 70, 17), "float16", seed=3)
PAIRS = GROUPED.pairs


def some_thorough(names: Iterable[str], on_host: Iterable[str], on_wmma_too: str) -> list[Any]:
    """Parameters of which each is kernels to compile: those `on_host` are met in other tests too, by every family."""
    marks = dict.fromkeys(names, pytest.mark.thorough_on_wmma) | dict.fromkeys(on_host, pytest.mark.thorough_on_host)
    marks[on_wmma_too] = ()
    return [pytest.param(name, marks=marks[name]) for name in sorted(names)]


def check(ring: Ring, **changes: Any) -> None:
    problem = dataclasses.replace(GROUPED, **changes)
    ring.check_forward(problem)
    ring.check_backward(problem)


def test_every_combination_is_accurate(ring: Ring) -> None:
    @ring.given(variants=VARIANTS, examples={"host": 3, "gpu": 40}.get(ring.name, 100))
    def check_combination(problem: AttentionProblem) -> None:
        ring.check_forward(problem)
        ring.check_backward(problem)

    check_combination()


# Scores reach 22: they are far above the cap, around it, below it and hardly a part of it.
@pytest.mark.parametrize("softcap", [1e-30, 0.5, 8.0, 30.0, 100.0, 200.0, 1e30])
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.thorough_on_host), -1.0])
def test_softcap(ring: Ring, softcap: float, scale: float) -> None:
    check(ring, softcap=softcap, scale=scale)


# Kernels have shorter ways for tiles whose scores are all small: sorted, tiles take each way, and shuffled the longest.
@pytest.mark.parametrize("softcap, scale", [(8.0, 0.25), (8.0, -0.25), (1e-2, 1e-4), (8.0, 0.0)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_softcap_of_single_scores(ring: Ring, softcap: float, scale: float, shuffled: bool) -> None:
    products = 5 * softcap / abs(scale or 1) * (1 - 2.0**-6) ** np.arange(700)
    products = np.concatenate([products, [np.nan], -products, [np.inf, -np.inf]])
    if shuffled:
        products = np.random.default_rng(0).permutation(products)
    q, one = products.astype(np.float16)[:, None], np.ones((1, 1), np.float16)

    _, lse = ring.attention(*map(ring.asarray, (q, one, one)), scale=scale, softcap=softcap, return_lse=True)

    with np.errstate(invalid="ignore"):
        expected = softcap * np.tanh(scale * q[:, 0].astype(np.float64) / softcap)
    np.testing.assert_allclose(ring.numpy(lse), expected, rtol=2.0**-21)


# By a dlse of 1 and a lone key with weight 1 they are the slopes of scores.
@pytest.mark.parametrize("softcap", [1.0, 8.0, 1000.0])
@pytest.mark.parametrize("scale", [0.25, pytest.param(-0.25, marks=pytest.mark.thorough_on_host)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gradients_of_single_scores_with_a_softcap(ring: Ring, softcap: float, scale: float, shuffled: bool) -> None:
    products = 4 * softcap / abs(scale) * (1 - 2.0**-6) ** np.arange(700)
    products = np.concatenate([products, -products])
    if shuffled:
        products = np.random.default_rng(0).permutation(products)
    q, one = products.astype(np.float16)[:, None], np.ones((1, 1), np.float16)
    dout, dlse = np.zeros_like(q), np.ones(len(q), np.float32)

    _, vjp = ring.attention_vjp(*map(ring.asarray, (q, one, one)), scale=scale, softcap=softcap, return_lse=True)
    dq, _, _ = vjp(*map(ring.asarray, (dout, dlse)))

    expected = scale * (1 - np.tanh(scale * q.astype(np.float64) / softcap) ** 2)
    np.testing.assert_allclose(ring.numpy(dq), expected, rtol=2.0**-10 + 2.0**-12, atol=2.0**-20)


@pytest.mark.parametrize("alibi", ["heads", "batch"])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi_slopes(ring: Ring, alibi: Any, causal: Any) -> None:
    check(ring, alibi=alibi, causal=causal)


# There kernels take the biases of a tile for a line over its keys: below the diagonal, above it, and on both sides.
@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("seqlens", [(20, 700), (700, 20), (300, 300)])
@pytest.mark.parametrize("scale", [None, *(pytest.param(x, marks=pytest.mark.thorough_on_host) for x in (0.3, 1e-9))])
def test_alibi_far_from_the_diagonal(ring: Ring, seqlens: tuple[int, int], scale: float | None) -> None:
    seqlen_q, seqlen_k = seqlens
    shapes = {"q": (4, seqlen_q, 32), "k": (2, seqlen_k, 32), "v": (2, seqlen_k, 17)}
    check(ring, **shapes, alibi="heads", scale=scale)


@pytest.mark.parametrize(
    "shape", [PAIRS, (40, 70), (4, 1, 70), (2, 1, 40, 70), (1, 4, 40, 1), (1, 1, 1, 70), (2, 1, 1, 1), (1, 1)]
)
@pytest.mark.parametrize("dtype", ["", pytest.param("float32", marks=pytest.mark.thorough_on_host)])
def test_bias_of_every_shape(ring: Ring, shape: tuple[int, ...], dtype: str) -> None:
    check(ring, bias=PairArray(shape, dtype=dtype))


@pytest.mark.thorough_on_wmma
def test_bias_of_bfloat16(ring: Ring) -> None:
    check(ring, dtype="bfloat16", bias=PairArray(PAIRS))


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("shape", [(1, 2, 150, 300), (2, 1, 150, 300), (2, 2, 1, 300), (150, 1), (1, 1)])
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.thorough_on_host), True])
def test_bias_of_several_tiles(
    ring: Ring, shape: tuple[int, ...], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dbias, "MIN_TILES", 1)
    problem = AttentionProblem((2, 2, 150, 32), (2, 1, 300, 32), (2, 1, 300, 17), "float16", seed=1)
    ring.check_backward(dataclasses.replace(problem, bias=PairArray(shape), causal="top-left" if causal else False))


@pytest.mark.thorough_on_wmma
def test_bias_beside_every_head_dim(ring: Ring) -> None:
    for head_dim, head_dim_v in ring.head_dim_pairs:
        q, k, v = (2, 2, 66, head_dim), (2, 1, 130, head_dim), (2, 1, 130, head_dim_v)
        ring.check_backward(AttentionProblem(q, k, v, "float16", causal=True, bias=PairArray((2, 66, 130))))


@pytest.mark.host
def test_the_gradient_of_a_bias_on_a_chip_without_mma_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bits too it is then computed by the kernel on nvcuda::wmma."""
    if shutil.which("g++") is None:
        pytest.skip("the host ring needs g++")
    device = HostDevice(chip=Chip("Turing", (7, 5), 64 << 10))
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(device))
    problem = AttentionProblem((2, 2, 66, 192), (2, 1, 130, 192), (2, 1, 130, 128), "float16", causal=True)
    host_ring("wmma").check_backward(dataclasses.replace(problem, bias=PairArray((2, 66, 130))))


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize(
    "other",
    [
        *(pytest.param(name, marks=pytest.mark.thorough_on_host) for name in ("softcap", "dropout_p", "block_mask")),
        *("alibi", "score_mod", "mask"),
    ],
)
def test_bias_of_several_batch_entries_beside_another_option(ring: Ring, other: str) -> None:
    """Whatever the entries have of their own must not be that of the one before."""
    values: dict[str, Any] = {"softcap": 2.0, "alibi": "batch", "score_mod": "relative", "dropout_p": 0.3}
    values |= {"mask": PairArray((3, 1, 150, 140), hidden=0.3), "block_mask": True}
    problem = AttentionProblem((3, 2, 150, 32), (3, 2, 140, 32), (3, 2, 140, 32), "float16", seed=1)
    ring.check_backward(dataclasses.replace(problem, bias=PairArray((2, 150, 140)), **{other: values[other]}))


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("name", ["dout", "q", "k", "v"])
@pytest.mark.parametrize("shape", [(2, 40, 70), (1, 70), (40, 1)])
def test_nan_spreads_to_the_gradient_of_a_bias_as_in_the_reference(
    ring: Ring, name: str, shape: tuple[int, ...]
) -> None:
    problem = dataclasses.replace(GROUPED, q=(2, 40, 32), k=(2, 70, 32), v=(2, 70, 32), bias=PairArray(shape))
    arrays = dict(zip(("dout", "q", "k", "v"), (problem.dout(), *problem.arrays()), strict=True))
    arrays[name][0, 35, 3] = np.nan
    bias = problem.options["bias"]
    dout, q, k, v = map(ring.asarray, arrays.values())
    _, vjp = ring.attention_vjp(q, k, v, bias=ring.asarray(bias), causal=True, return_dbias=True)
    dq, dk, dv, dbias = vjp(dout)
    assert_gradients_accurate(*arrays.values(), dq, dk, dv, dbias=dbias, bias=bias, causal=True)


@pytest.mark.parametrize(
    "shapes", [((0, 2, 20, 32),) * 3, ((1, 2, 0, 32), *((1, 2, 20, 32),) * 2), ((2, 20, 32), *((2, 0, 32),) * 2)]
)
def test_gradients_of_options_of_empty_problems_are_zero(ring: Ring, shapes: Any) -> None:
    q, k, v = (ring.asarray(np.zeros(shape, np.float16)) for shape in shapes)
    bias = ring.asarray(np.zeros((2, 1, k.shape[-2]), np.float16))
    options = {"bias": bias, "sinks": ring.asarray(np.zeros(2, np.float32))}
    out, vjp = ring.attention_vjp(q, k, v, **options, return_dbias=True, return_dsinks=True)
    *_, dbias, dsinks = vjp(ring.xp.zeros_like(out))
    assert (ring.numpy(dbias) == 0).all()
    assert (ring.numpy(dsinks) == 0).all()


@pytest.mark.thorough_on_wmma
def test_queries_beyond_the_end_do_not_reach_the_gradient_of_a_bias(ring: Ring) -> None:
    """What a score_mod makes of rows that are only padding of a tile may be infinite."""
    q, k, v = (ring.asarray(x) for x in dataclasses.replace(GROUPED, dtype="float32").arrays())
    bias = ring.asarray(np.zeros((4, 1, 70), np.float32))
    mod: Any = "score + 1.0f / (40 - q_idx)"
    if ring.name == "numpy":
        mod = lambda score, b, h, q_idx, kv_idx: score + 1.0 / (40 - q_idx)  # noqa: E731
    out, vjp = ring.attention_vjp(q, k, v, bias=bias, score_mod=mod, return_dbias=True)
    assert np.isfinite(ring.numpy(vjp(ring.xp.ones_like(out))[3])).all()


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("strides", PAIR_STRIDES)
def test_bias_and_mask_of_any_strides(ring: Ring, strides: Any) -> None:
    check(ring, bias=PairArray(PAIRS, strides), mask=PairArray(PAIRS, strides, hidden=0.3))


def test_bias_of_minus_infinity_hides(ring: Ring) -> None:
    problem = dataclasses.replace(GROUPED, bias=PairArray((40, 70), hidden=0.4))
    assert np.isneginf(problem.options["bias"][0]).all()  # a row that sees nothing
    ring.check_forward(problem)
    ring.check_backward(problem)


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize(
    "value",
    [-1e9, *(pytest.param(x, marks=pytest.mark.thorough_on_host) for x in (-1e30, float(np.finfo(np.float32).min)))],
)
def test_rows_that_a_large_number_hides_are_means(ring: Ring, value: float) -> None:
    """A mask that is added, as many write it: of a row that sees nothing all scores are that number."""
    for dtype in set(ring.dtypes) & {"float16", "bfloat16", "float32"}:
        problem = dataclasses.replace(GROUPED, dtype=dtype)
        arrays = problem.arrays()
        bias = np.zeros((40, 70), np.float32)
        bias[3] = bias[7] = bias[5, :69] = value
        q, k, v = map(ring.asarray, arrays)
        out, lse = ring.attention(q, k, v, return_lse=True, bias=ring.asarray(bias))
        assert_attention_accurate(*arrays, out, lse, bias=bias)
        dout = ring.asarray(problem.dout())
        gradients = ring.attention_backward(dout, q, k, v, out, lse, bias=ring.asarray(bias))
        may_be_wgmma = ring.name == "gpu" and ring.kernel == "auto" and dtype != "float32"
        if value > -2e38 or not may_be_wgmma:  # whose lse in powers of two would be -inf, as that of a row without keys
            assert_gradients_accurate(dout, *arrays, *gradients, bias=bias)
        assert all(np.isfinite(ring.numpy(x)).all() for x in gradients)


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("head_dim", [8, pytest.param(64, marks=pytest.mark.thorough_on_host)])
@pytest.mark.parametrize("seqlen_k", [2, 5])
def test_the_gradient_of_a_float32_bias_at_large_scores(ring: Ring, seqlen_k: int, head_dim: int) -> None:
    """Its kernel computes scores once more, to the same last bits as the forward pass, or weights do not sum to 1."""
    if ring.name == "gpu":
        pytest.skip("the lse, rounded, and sums that tensor cores cut may take all that the rule allows (README)")
    pairs, values = PairArray((1, 4, 40, seqlen_k)), (2, 2, seqlen_k, head_dim)
    for seed in range(8):
        ring.check_backward(
            AttentionProblem((2, 4, 40, head_dim), values, values, "float32", 10.0, bias=pairs, seed=seed)
        )


@pytest.mark.parametrize("exponent", [4, 16, 22, 25, 26, 27, 30, 100])
def test_what_a_bias_adds_to_a_whole_row_changes_nothing(ring: Ring, exponent: int) -> None:
    """Scores of any size, in steps of what float32 tells apart, growing or falling from key to key, or in any order."""
    for dtype in set(ring.dtypes) & {"float16", "bfloat16", "float32"}:
        problem = AttentionProblem((2, 4, 40, 32), (2, 2, 300, 32), (2, 2, 300, 17), dtype)
        q, k, v = problem.arrays()
        q[:] = 0
        step = max(1.0, 2.0 ** (exponent - 23))
        steps = np.sort(np.random.default_rng(exponent).integers(0, 12, (40, 300)))
        steps[::3] = np.random.default_rng(0).permuted(steps[::3], axis=1)
        steps[1::3] = steps[1::3, ::-1]
        sign = np.where(np.arange(40) % 2 == 0, 1, -1)[:, None]
        bias = (sign * 2.0**exponent + steps * step).astype(np.float32)
        out, lse = ring.attention(*map(ring.asarray, (q, k, v)), return_lse=True, bias=ring.asarray(bias))
        assert_attention_accurate(q, k, v, out, lse, bias=bias)


@pytest.mark.parametrize("shape", [PAIRS, (40, 70), (2, 1, 1, 70), (4, 40, 1)])
@pytest.mark.parametrize("hidden", [0.3, 1.0])
def test_mask_of_every_shape(ring: Ring, shape: tuple[int, ...], hidden: float) -> None:
    check(ring, mask=PairArray(shape, hidden=hidden), causal="top-left")


def test_what_a_mask_hides_is_inert(ring: Ring) -> None:
    problem = dataclasses.replace(GROUPED, dtype="float32")
    q, k, v = problem.arrays()
    mask = np.ones((40, 70), bool)
    mask[:, 30:45] = False
    bias = np.zeros((40, 70), np.float32)
    options = {"mask": ring.asarray(mask), "bias": ring.asarray(bias)}
    out, lse = ring.attention(*map(ring.asarray, (q, k, v)), return_lse=True, **options)
    k[..., 30:45, :] = v[..., 30:45, :] = np.nan
    bias[:, 30:45] = np.nan
    options["bias"] = ring.asarray(bias)
    same, same_lse = ring.attention(*map(ring.asarray, (q, k, v)), return_lse=True, **options)
    assert_attention_accurate(q, k, v, same, same_lse, mask=mask, bias=bias)
    assert_attention_accurate(q, k, v, out, lse, mask=mask, bias=bias)


@pytest.mark.thorough_on_wmma
def test_a_block_mask_hides_its_blocks(ring: Ring) -> None:
    problem = AttentionProblem((2, 2, 150, 16), (2, 1, 300, 16), (2, 1, 300, 16), "float16", block_mask=True, seed=1)
    assert 0 < problem.options["block_mask"].visible.sum() < 24
    for causal in (False, True):
        ring.check_forward(dataclasses.replace(problem, causal=causal))
        ring.check_backward(dataclasses.replace(problem, causal=causal))


@pytest.mark.parametrize("lengths", [(150, 0), (0, 300)], ids=str)
def test_a_block_mask_without_any_pair(ring: Ring, lengths: tuple[int, int]) -> None:
    q, kv = (2, 2, lengths[0], 32), (2, 1, lengths[1], 32)
    problem = AttentionProblem(q, kv, kv, "float16", causal=True, block_mask=True, mask_mod="document", sinks="float32")
    ring.check_forward(problem)
    ring.check_backward(problem)


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_a_block_mask_beside_the_mask_that_it_is_made_of(ring: Ring, head_dim: int) -> None:
    """Some blocks are hidden, some are seen wholly, and of others the mask says which pairs are seen."""
    mask = np.tril(np.ones((400, 400), bool)) & ~np.eye(400, k=-7, dtype=bool)
    mask[256:, :130] = False
    mask[128:256, :128] = True
    block_mask = cuflash.make_block_mask(ring.asarray(mask))
    assert block_mask.visible.sum() == 8 and block_mask.full.sum() == 1
    q, k, v = (np.random.default_rng(i).standard_normal((2, 400, head_dim)).astype(np.float16) for i in range(3))
    arrays = [ring.asarray(x) for x in (q, k, v)]
    out, lse = ring.attention(*arrays, mask=ring.asarray(mask), block_mask=block_mask, return_lse=True)
    assert_attention_accurate(q, k, v, out, lse, mask=mask)


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.thorough_on_host), "float32"])
def test_sinks(ring: Ring, dtype: str) -> None:
    check(ring, sinks=dtype, causal="top-left", window_size=(5, 3))


@pytest.mark.thorough_on_wmma
def test_a_row_that_sees_only_its_sink(ring: Ring) -> None:
    problem = dataclasses.replace(GROUPED, sinks="float32", mask=PairArray((40, 1), hidden=0.5))
    hidden = ~problem.options["mask"][:, 0]
    out, lse = ring.attention(*problem.arrays(ring.xp), return_lse=True, **ring.options(problem))
    assert (ring.numpy(out)[:, :, hidden] == 0).all()
    expected = problem.options["sinks"][:, None] * np.ones(hidden.sum(), np.float32)
    np.testing.assert_allclose(ring.numpy(lse)[:, :, hidden], np.broadcast_to(expected, (2, *expected.shape)), 1e-6)
    ring.check_backward(problem)


@pytest.mark.parametrize("dropout_p", [1e-6, 0.17, 0.5, 0.9, 0.999999])
def test_dropout(ring: Ring, dropout_p: float) -> None:
    check(ring, dropout_p=dropout_p)


def test_a_seed_may_be_an_array(ring: Ring) -> None:
    arrays = GROUPED.arrays(ring.xp)
    seed = 2**63 + 12345
    out, lse = ring.attention(*arrays, dropout_p=0.3, seed=seed, return_lse=True)
    ring.assert_same_bits(ring.attention(*arrays, dropout_p=0.3, seed=ring.asarray(np.array([seed], np.uint64))), out)
    _, other_lse = ring.attention(*arrays, dropout_p=0.3, seed=seed - 1, return_lse=True)
    ring.assert_same_bits(other_lse, lse)
    assert (ring.attention(*arrays, dropout_p=0.3, seed=seed - 1) != out).any()
    assert (ring.attention(*arrays, dropout_p=0.3, seed=seed - 2**32) != out).any()


def test_the_gradient_of_lse(ring: Ring) -> None:
    check(ring, with_dlse=True, causal="top-left")
    check(ring, with_dlse=True, sinks="float32", mask=PairArray((40, 1), hidden=0.5))


@pytest.mark.parametrize("name", some_thorough(SCORE_MODS, ("relative", "square", "strength"), "table"))
def test_score_mods(ring: Ring, name: str) -> None:
    check(ring, score_mod=name)


# What a score can go through (docs/variants.md), in CUDA and in Python.
FUNCTIONS = (
    "isnan(score) || isinf(score) || !isfinite(score) ? score : pow(2.0f, 0.5f * score) + pow(fabs(score) + 1.0f, 0.5f)"
    "+ exp(0.1f * score) + exp2f(0.1f * score) + log(abs(score) + 1.0f) + log2(abs(score) + 1.0f) + log1p(abs(score))"
    "+ sqrt(abs(score) + 1.0f) + tanh(score) + sin(score) + cosf(score) + max(score, 0.1f) + fmin(score, 0.2f)"
    "+ pow(0.0f * score, 0.0f) + pow(0.0f, abs(score))",
    lambda score, b, h, q_idx, kv_idx: (
        (2.0 ** (0.5 * score) + (abs(score) + 1.0) ** 0.5)
        + (np.exp(0.1 * score) + np.exp2(0.1 * score) + np.log(abs(score) + 1.0) + np.log2(abs(score) + 1.0))
        + (np.log1p(abs(score)) + np.sqrt(abs(score) + 1.0) + np.tanh(score) + np.sin(score) + np.cos(score))
        + (np.maximum(score, 0.1) + np.minimum(score, 0.2))
        + ((0.0 * score) ** 0.0 + 0.0 ** abs(score))
    ),
)


@pytest.mark.thorough_on_wmma
def test_functions_of_a_score(ring: Ring) -> None:
    expression, function = FUNCTIONS
    arrays, dout = GROUPED.arrays(), GROUPED.dout()
    q, k, v = map(ring.asarray, arrays)
    score_mod = function if ring.name == "numpy" else expression
    out, vjp = ring.attention_vjp(q, k, v, score_mod=score_mod)
    assert_attention_accurate(*arrays, out, score_mod=function)
    assert_gradients_accurate(dout, *arrays, *vjp(ring.asarray(dout)), score_mod=function)


@pytest.mark.parametrize("name", some_thorough(MASK_MODS, (), "document"))
def test_mask_mods(ring: Ring, name: str) -> None:
    check(ring, mask_mod=name)


def test_the_order_of_the_steps(ring: Ring) -> None:
    """Softcap, then bias and slopes, then score_mod, then what hides: any other order gives other results."""
    check(
        ring, softcap=1.0, bias=PairArray(PAIRS), alibi="batch", score_mod="square", mask_mod="document", causal=True,
        sinks="float32", dropout_p=0.3, with_dlse=True,
    )  # fmt: skip


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_variants_in_every_layout_and_rank(ring: Ring, layout: Any) -> None:
    variants: dict[str, Any] = {"layout": layout, "dtype": "float16", "alibi": "heads", "sinks": "float32"}
    variants |= {"dropout_p": 0.2, "with_dlse": True, "score_mod": "relative", "bias": PairArray((17, 33))}
    for shape in ((17, 8), (17, 1, 8)) if layout == "bshd" else ((17, 8), (1, 17, 8)):
        kv = tuple(33 if size == 17 else size for size in shape)
        problem = AttentionProblem(shape, kv, kv, **variants)
        ring.check_forward(problem)
        ring.check_backward(problem)
