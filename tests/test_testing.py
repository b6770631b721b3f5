"""cuflash.testing: a right reference, a rule that tells good results from bad ones, faithful strategies."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings

import cuflash
from cuflash.testing import (
    assert_attention_accurate,
    assert_attention_varlen_accurate,
    assert_gradients_accurate,
    assert_gradients_varlen_accurate,
    plain_attention,
    plain_attention_backward,
    reference_attention,
    reference_attention_backward,
    reference_attention_varlen,
    reference_attention_varlen_backward,
)
from cuflash.testing.mods import SCORE_MODS
from cuflash.testing.strategies import (
    PACKED_VARIANTS,
    PAIR_STRIDES,
    VARIANTS,
    AttentionProblem,
    PackedProblem,
    PairArray,
    attention_problems,
    packed_problems,
)

PROBLEM = AttentionProblem((2, 4, 33, 16), (2, 2, 40, 16), (2, 2, 40, 8), causal=True)
# To see that something is drawn at all: there is no need to shrink it.
DRAW_MANY = settings(max_examples=20000, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
DTYPES = ("float16", "bfloat16", "float32", "float64")


def definition(q: Any, k: Any, v: Any, i: int, keys: list[int], scale: float) -> tuple[Any, float]:
    """One row of attention in plain Python: `out` and `lse`."""
    scores = [scale * sum(float(a) * float(b) for a, b in zip(q[i], k[j], strict=True)) for j in keys]
    weights = [math.exp(score) for score in scores]
    out = sum(w * v[j] for w, j in zip(weights, keys, strict=True)) / sum(weights)
    return out, math.log(sum(weights))


def test_the_reference_is_the_definition() -> None:
    q, k, v = AttentionProblem((5, 4), (7, 4), (7, 3), "float64").arrays()
    seen = {  # of query 2 of 5, among 7 keys
        (False, None): [0, 1, 2, 3, 4, 5, 6],
        (True, None): [0, 1, 2, 3, 4],
        ("bottom-right", None): [0, 1, 2, 3, 4],
        ("top-left", None): [0, 1, 2],
        (False, (1, 1)): [3, 4, 5],
        (False, (0, None)): [4, 5, 6],
        (False, (None, 0)): [0, 1, 2, 3, 4],
        (True, (2, 9)): [2, 3, 4],
        ("top-left", (1, 1)): [1, 2],
    }
    for (causal, window_size), keys in seen.items():
        out, lse = reference_attention(q, k, v, causal=causal, window_size=window_size, scale=0.3)
        expected_out, expected_lse = definition(q, k, v, 2, keys, 0.3)
        np.testing.assert_allclose(out[2], expected_out, rtol=1e-12)
        np.testing.assert_allclose(lse[2], expected_lse, rtol=1e-12)


def test_the_reference_groups_heads_and_broadcasts_batches() -> None:
    q, k, v = AttentionProblem((3, 4, 5, 4), (1, 2, 7, 4), (2, 7, 3)).arrays()
    out, lse = reference_attention(q, k, v)
    assert out.shape == (3, 4, 5, 3)
    assert lse.shape == (3, 4, 5)
    for batch in range(3):
        for head in range(4):
            expected = reference_attention(q[batch, head], k[0, head // 2], v[head // 2])
            np.testing.assert_allclose(out[batch, head], expected[0], rtol=1e-12)
            np.testing.assert_allclose(lse[batch, head], expected[1], rtol=1e-12)


def test_the_reference_keeps_nan_out_of_rows_that_do_not_see_it() -> None:
    q, k, v = AttentionProblem((5, 4), (5, 4), (5, 4)).arrays()
    clean, _ = reference_attention(q, k, v, causal=True)
    for x in (k, v):
        poisoned = x.copy()
        poisoned[3] = np.nan
        arrays = (q, poisoned, v) if x is k else (q, k, poisoned)
        out, _ = reference_attention(*arrays, causal=True)
        np.testing.assert_allclose(out[:3], clean[:3], rtol=1e-12)
        assert np.isnan(out[3:]).all()


EVERYTHING: dict[str, Any] = {
    "bias": PairArray((2, 1, 5, 7), hidden=0.2), "mask": PairArray((4, 5, 7), hidden=0.3), "softcap": 1.5,
    "alibi": "batch", "sinks": "float64", "dropout_p": 0.3, "mask_mod": "stripes", "with_dlse": True, "causal": True,
}  # fmt: skip
SMALL = AttentionProblem((2, 4, 5, 3), (1, 2, 7, 3), (2, 2, 7, 4), "float64")


@pytest.mark.parametrize("score_mod", [None, "relative"])
def test_the_reference_is_the_definition_of_the_variants(score_mod: str | None) -> None:
    problem = dataclasses.replace(SMALL, score_mod=score_mod, **EVERYTHING)
    q, k, v = problem.arrays()
    options = problem.options
    kept = cuflash.dropout_mask((2, 4, 5, 7), 0.3, options["seed"])
    out, lse = reference_attention(q, k, v, **options)
    for b, h, i in np.ndindex(2, 4, 5):
        sink = options["sinks"][h]
        total, row = math.exp(sink), np.zeros(4)
        for j in range(i + 3):  # causal
            score = 1.5 * math.tanh(q[b, h, i] @ k[0, h // 2, j] / math.sqrt(3) / 1.5)
            score += options["bias"][b, 0, i, j] - float(options["alibi_slopes"][b, h]) * abs(i + 2 - j)
            score += 0.0625 * (i - j) if score_mod else 0
            if options["mask"][h, i, j] and (i + j + h) % 3 != 0:
                total += math.exp(score)
                row += math.exp(score) * kept[b, h, i, j] / 0.7 * v[b, h // 2, j]
        np.testing.assert_allclose(out[b, h, i], row / total, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(lse[b, h, i], math.log(total), rtol=1e-12)


@pytest.mark.parametrize("score_mod", [None, *SCORE_MODS])
def test_gradients_of_the_reference_are_finite_differences(score_mod: str | None) -> None:
    variants = EVERYTHING | ({} if score_mod is None else {"bias": PairArray((4, 1, 7)), "score_mod": score_mod})
    problem = dataclasses.replace(SMALL, **variants)
    options, dout, dlse = problem.options, problem.dout(), problem.dlse()
    arrays = problem.arrays()
    gradients = reference_attention_backward(dout, *arrays, dlse=dlse, return_dbias=True, return_dsinks=True, **options)
    step = 1e-5
    for x, gradient in zip((*arrays, options["bias"], options["sinks"]), gradients, strict=True):
        numeric = np.empty_like(x)
        for index in np.ndindex(x.shape):
            centre = x[index]
            values = []
            for x[index] in (centre + step, centre - step):
                out, lse = reference_attention(*arrays, **options)
                values.append((out * dout).sum() + np.where(np.isfinite(lse), lse * dlse, 0).sum())
            x[index] = centre
            numeric[index] = (values[0] - values[1]) / (2 * step) if np.isfinite(centre) else 0
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_the_reference_of_packed_sequences_is_a_loop() -> None:
    problem = PackedProblem(
        (5, 0, 7), (9, 3, 4), (6, 3, 4), heads=(4, 2), tails=(2, 1), dtype="float64", causal=True,
        alibi="batch", sinks="float64", score_mod="relative", with_dlse=True,
    )  # fmt: skip
    q, k, v, cu_q, cu_k = problem.arrays()
    dout, dlse, options = problem.dout(), problem.dlse(), problem.options
    out, lse = reference_attention_varlen(q, k, v, cu_q, cu_k, **options)
    dq, dk, dv, dsinks = reference_attention_varlen_backward(
        dout, q, k, v, cu_q, cu_k, dlse=dlse, return_dsinks=True, **options
    )
    used = options.pop("seqused_k")
    slopes, sum_dsinks = options.pop("alibi_slopes"), 0
    for s in range(3):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s] + used[s])
        own = {"alibi_slopes": slopes[s], "layout": "bshd", **options}
        part_out, part_lse = reference_attention(q[rows], k[keys], v[keys], **own)
        np.testing.assert_array_equal(out[rows], part_out)
        np.testing.assert_array_equal(lse[:, rows], part_lse)
        *parts, part_dsinks = reference_attention_backward(
            dout[rows], q[rows], k[keys], v[keys], dlse=dlse[:, rows], return_dsinks=True, **own
        )
        for whole, part in zip((dq[rows], dk[keys], dv[keys]), parts, strict=True):
            np.testing.assert_array_equal(whole, part)
        sum_dsinks = sum_dsinks + part_dsinks
    np.testing.assert_allclose(dsinks, sum_dsinks, rtol=1e-12)
    assert (out[12:] == 0).all() and np.isneginf(lse[:, 12:]).all() and (dq[12:] == 0).all()
    assert (dk[6:9] == 0).all() and (dv[16:] == 0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcup": 2.0}, TypeError, "^softcup: is not an option here; allowed are scale, causal, .*, layout$"),
        ({"kernel": "wmma"}, TypeError, "^kernel: is not an option here"),
        ({"first_batch": 1}, TypeError, "^first_batch: is not an option here"),
        (
            {"score_mod": "2 * score"},
            TypeError,
            "score_mod is the CUDA expression .*; give a Python",
        ),
        ({"dropout_p": 0.5}, ValueError, "seed: got None with dropout_p=0.5"),
        ({"dropout_p": 1.0, "seed": 0}, ValueError, "dropout_p: got 1.0"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"scale": "0.5"}, TypeError, "scale: got '0.5'"),
        ({"causal": "top_left"}, ValueError, "causal: got 'top_left'"),
        ({"window_size": (-1, -1)}, ValueError, "window_size: got"),
        ({"layout": "BSHD"}, ValueError, "layout: got 'BSHD'"),
        ({"mask": np.ones((1, 1), np.int8)}, TypeError, "mask: dtype int8"),
        ({"bias": np.ones((1, 1), bool)}, TypeError, "bias: dtype bool"),
        ({"mask_mod": lambda *_: np.ones(1)}, TypeError, "mask_mod: returned dtype float64"),
        ({"sinks": np.zeros(7)}, ValueError, r"sinks: shape is \(7,\)"),
        ({"alibi_slopes": np.zeros(7, np.float32)}, ValueError, r"alibi_slopes: shape is \(7,\)"),
        ({"block_mask": np.ones((1, 1), bool)}, TypeError, "block_mask: got a numpy.ndarray"),
        (
            {"block_mask": cuflash.make_block_mask(np.tri(3, dtype=bool))},
            ValueError,
            "mask: got None beside a block_mask",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arrays, dout = PROBLEM.arrays(), PROBLEM.dout()
    for call in (
        lambda: reference_attention(*arrays, **options),
        lambda: reference_attention_backward(dout, *arrays, **options),
        lambda: plain_attention(*arrays, **options),
        lambda: plain_attention_backward(dout, *arrays, **options),
        lambda: assert_attention_accurate(*arrays, dout, **options),
        lambda: assert_gradients_accurate(dout, *arrays, *arrays, **options),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", ["bias", "mask", "layout", "softcup"])
def test_wrong_options_of_packed_sequences_are_refused(name: str) -> None:
    problem = PackedProblem((5, 3), (9, 3))
    arrays, dout = problem.arrays(), problem.dout()
    for call in (
        lambda: reference_attention_varlen(*arrays, **{name: None}),
        lambda: reference_attention_varlen_backward(dout, *arrays, **{name: None}),
        lambda: assert_attention_varlen_accurate(*arrays, dout, **{name: None}),
        lambda: assert_gradients_varlen_accurate(dout, *arrays, *arrays[:3], **{name: None}),
    ):
        with pytest.raises(TypeError, match=f"^{name}: is not an option here; allowed are (?!.*(bias|mask,|layout))"):
            call()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cu_seqlens_q", [0, 5, 9]),
        ("cu_seqlens_q", [1, 5, 8]),
        ("cu_seqlens_q", 8),
        ("cu_seqlens_k", [0, 9, 13]),
        ("cu_seqlens_k", [0, 9, 5]),
        ("cu_seqlens_k", [0, 12]),
        ("seqused_k", [9, 4]),
        ("seqused_k", [9]),
    ],
)
def test_wrong_offsets_of_packed_sequences_are_refused(name: str, values: Any) -> None:
    problem = PackedProblem((5, 3), (9, 3))
    *arrays, cu_seqlens_q, cu_seqlens_k = problem.arrays()
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, name: np.asarray(values, np.int32)}
    offsets, dout = (lengths.pop("cu_seqlens_q"), lengths.pop("cu_seqlens_k")), problem.dout()
    for call in (
        lambda: reference_attention_varlen(*arrays, *offsets, **lengths),
        lambda: reference_attention_varlen_backward(dout, *arrays, *offsets, **lengths),
        lambda: assert_attention_varlen_accurate(*arrays, *offsets, dout, **lengths),
        lambda: assert_gradients_varlen_accurate(dout, *arrays, *offsets, *arrays, **lengths),
        lambda: cuflash.attention_varlen(*arrays, *offsets, **lengths),
    ):
        with pytest.raises(ValueError, match=f"^{name}: (got|shape is)"):
            call()


def test_gradients_of_options_that_are_not_given_are_refused() -> None:
    arrays, dout = PROBLEM.arrays(), PROBLEM.dout()
    for backward in (reference_attention_backward, plain_attention_backward):
        with pytest.raises(ValueError, match="return_dbias: got True without bias"):
            backward(dout, *arrays, return_dbias=True)
    with pytest.raises(ValueError, match="dsinks: got a gradient to judge, but sinks is None"):
        assert_gradients_accurate(dout, *arrays, *arrays, dsinks=dout)


def test_arrays_that_do_not_fit_are_refused() -> None:
    q, k, v = PROBLEM.arrays()
    with pytest.raises(ValueError, match=r"\[1, 2, 2\] heads"):
        reference_attention(q[:, :1], k, v)
    with pytest.raises(ValueError, match=r"\[4, 2, 1\] heads"):
        reference_attention(q, k, v[:, :1])
    with pytest.raises(TypeError, match="k: dtype float64 differs from q's float32"):
        assert_attention_accurate(q, k.astype(np.float64), v, q)
    with pytest.raises(TypeError, match="q: dtype int64 is not supported"):
        assert_attention_accurate(q.astype(np.int64), k, v, q)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", np.zeros((2, 1, 1, 1), np.float32)),
        ("bias", np.zeros((33, 1), np.float32)),
        ("mask", np.ones((2, 1, 1, 1), bool)),
        ("block_mask", cuflash.BlockMask.from_blocks(np.ones((2, 1, 1, 1), bool), shape=(1, 40))),
        ("block_mask", cuflash.BlockMask.from_blocks(np.ones((1, 1), bool), shape=(1, 41))),
    ],
)
def test_pairs_do_not_broadcast_to_options(name: str, value: Any) -> None:
    problem = AttentionProblem((1, 4, 1, 16), (1, 2, 40, 16), (1, 2, 40, 8))
    arrays, dout = problem.arrays(), problem.dout()
    for call in (
        lambda: cuflash.attention(*arrays, **{name: value}),
        lambda: reference_attention(*arrays, **{name: value}),
        lambda: reference_attention_backward(dout, *arrays, **{name: value}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()


def test_gradients_of_results_of_another_shape_are_refused() -> None:
    arrays, dout, lse = PROBLEM.arrays(), PROBLEM.dout(), np.zeros((2, 4, 33), np.float32)
    with pytest.raises(ValueError, match=r"^dout: shape is \(1, 4, 33, 8\)"):
        reference_attention_backward(dout[:1], *arrays)
    with pytest.raises(ValueError, match=r"^dlse: shape is \(2, 33, 4\)"):
        reference_attention_backward(dout, *arrays, dlse=lse.swapaxes(1, 2))
    packed = PackedProblem((5, 3), (9, 3))
    with pytest.raises(ValueError, match=r"^dout: shape is \(9, 1, 8\)"):
        reference_attention_varlen_backward(np.zeros((9, 1, 8), np.float32), *packed.arrays())
    with pytest.raises(ValueError, match=r"^dlse: shape is \(1, 9\)"):
        reference_attention_varlen_backward(packed.dout(), *packed.arrays(), dlse=np.zeros((1, 9), np.float32))


def test_slopes_of_packed_sequences_broadcast_as_in_a_call() -> None:
    arrays = PackedProblem((5, 3), (9, 3), heads=(2, 1)).arrays()
    slopes = np.array([0.5, 0.25], np.float32)
    for alike in (slopes, slopes[None], np.stack([slopes, slopes])):
        out, lse = cuflash.attention_varlen(*arrays, alibi_slopes=alike, return_lse=True)
        assert_attention_varlen_accurate(*arrays, out, lse, alibi_slopes=alike)
    with pytest.raises(ValueError, match=r"^alibi_slopes: shape is \(3, 2\)"):
        reference_attention_varlen(*arrays, alibi_slopes=np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variants", [{}, EVERYTHING], ids=["plain", "everything"])
def test_plain_attention_passes_its_own_rule(dtype: str, variants: dict[str, Any]) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=dtype)
    if variants:
        problem = dataclasses.replace(SMALL, **variants | {"dtype": dtype, "sinks": dtype})
    arrays, dout, options = problem.arrays(), problem.dout(), problem.options
    assert_attention_accurate(*arrays, *plain_attention(*arrays, **options), **options)
    names = [name for name in ("dbias", "dsinks") if name[1:] in options]
    options["dlse"] = problem.dlse()
    asked = {f"return_{name}": True for name in names}
    dq, dk, dv, *others = plain_attention_backward(dout, *arrays, **asked, **options)
    judged = dict(zip(names, others, strict=True))
    assert_gradients_accurate(dout, *arrays, dq, dk, dv, **judged, **options)


@pytest.mark.parametrize("name", ["dbias", "dsinks"])
def test_a_wrong_gradient_of_an_option_is_caught(name: str) -> None:
    problem = dataclasses.replace(PROBLEM, bias=PairArray((33, 40)), sinks="float32", with_dlse=True)
    arrays, dout, options = problem.arrays(), problem.dout(), problem.options | {"dlse": problem.dlse()}
    *gradients, wrong = plain_attention_backward(dout, *arrays, **{f"return_{name}": True}, **options)
    with pytest.raises(AssertionError, match=f"{name} is not accurate"):
        assert_gradients_accurate(dout, *arrays, *gradients, **{name: wrong * np.float32(1 + 1e-5)}, **options)


def _worst(x: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(np.abs(x)), x.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 1])
def test_a_result_just_outside_of_the_rule_is_caught(dtype: str, index: int) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=dtype)
    arrays = problem.arrays()
    results = list(cuflash.attention(*arrays, return_lse=True, **problem.options))
    # Eight units in the last place of the largest element: what a lost bit or two of the sums would cost.
    eps = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}[results[index].dtype.name]
    results[index][_worst(results[index])] *= 1 + 8 * eps
    with pytest.raises(AssertionError, match=rf"{('out', 'lse')[index]} is not accurate: its largest error is"):
        assert_attention_accurate(*arrays, *results, **problem.options)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_gradient_is_caught(index: int) -> None:
    arrays, dout = PROBLEM.arrays(), PROBLEM.dout()
    _, vjp = cuflash.attention_vjp(*arrays, **PROBLEM.options)
    gradients = list(vjp(dout))
    gradients[index] = gradients[index] * np.float32(1 + 1e-5)
    with pytest.raises(AssertionError, match=rf"{('dq', 'dk', 'dv')[index]} is not accurate"):
        assert_gradients_accurate(dout, *arrays, *gradients, **PROBLEM.options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"differ in where they are NaN, at 1 of 2112 elements, first out\[1, 2, 3, 4\] = nan"),
        (np.inf, r"differ in where they are inf, at 1 of 2112 elements"),
        (-np.inf, r"differ in where they are -inf, at 1 of 2112 elements"),
    ],
)
def test_a_nan_or_infinity_too_many_is_caught(value: float, message: str) -> None:
    arrays = PROBLEM.arrays()
    out = cuflash.attention(*arrays, **PROBLEM.options)
    assert out.size == 2112
    out[1, 2, 3, 4] = value
    with pytest.raises(AssertionError, match=message):
        assert_attention_accurate(*arrays, out, **PROBLEM.options)


def test_a_nan_too_few_is_caught() -> None:
    q, k, v = PROBLEM.arrays()
    out = cuflash.attention(q, k, v)
    v[0, 0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="differ in where they are NaN"):
        assert_attention_accurate(q, k, v, out)


def test_a_missing_result_is_caught() -> None:
    arrays, dout = PROBLEM.arrays(), PROBLEM.dout()
    with pytest.raises(AssertionError, match=r"^out has shape \(\)"):
        assert_attention_accurate(*arrays, None, **PROBLEM.options)
    dq, _, dv = plain_attention_backward(dout, *arrays, **PROBLEM.options)
    with pytest.raises(AssertionError, match=r"^dk has shape \(\)"):
        assert_gradients_accurate(dout, *arrays, dq, None, dv, **PROBLEM.options)


def test_a_wrong_shape_or_dtype_is_caught() -> None:
    arrays = PROBLEM.arrays()
    out = cuflash.attention(*arrays, **PROBLEM.options)
    with pytest.raises(AssertionError, match=r"out has shape \(4, 33, 8\), expected \(2, 4, 33, 8\)"):
        assert_attention_accurate(*arrays, out[0], **PROBLEM.options)
    with pytest.raises(AssertionError, match="out has dtype float64, expected float32"):
        assert_attention_accurate(*arrays, out.astype(np.float64), **PROBLEM.options)


@pytest.mark.parametrize("wrong", ["causal", "window_size", "scale"])
def test_a_forgotten_option_is_caught(wrong: str) -> None:
    """Not by the rule alone, but by the rule on the problems that the strategies draw."""

    @settings(derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(attention_problems(max_seqlen=17))
    def check(problem: AttentionProblem) -> None:
        q, k, v = problem.arrays()
        options = {name: value for name, value in problem.options.items() if name != wrong}
        assert_attention_accurate(q, k, v, cuflash.attention(q, k, v, **options), **problem.options)

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("softcap", ["softcap"]), ("alibi", ["alibi_slopes"]), ("sinks", ["sinks"]), ("bias", ["bias"]),
        ("mask", ["mask"]), ("block_mask", ["block_mask"]), ("dropout", ["dropout_p", "seed"]),
        ("score_mod", ["score_mod"]), ("mask_mod", ["mask_mod"]), ("dlse", ["dlse"]),
    ],
)  # fmt: skip
def test_a_forgotten_variant_is_caught(variant: str, options: list[str]) -> None:
    @settings(derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(attention_problems(max_seqlen=17, head_dims=[8], variants=[variant]))
    def check(problem: AttentionProblem) -> None:
        arrays, dout, given_options = problem.arrays(), problem.dout(), problem.options
        if problem.with_dlse:
            given_options["dlse"] = problem.dlse()
        fewer = {name: value for name, value in given_options.items() if name not in options}
        gradients = plain_attention_backward(dout, *arrays, **fewer)
        assert_gradients_accurate(dout, *arrays, *gradients, **given_options)

    assert set(VARIANTS) >= {variant}
    with pytest.raises(AssertionError):
        check()


# One variant is drawn by itself, lest the search take minutes.
@pytest.mark.parametrize(
    ("variants", "condition"),
    [
        (VARIANTS, lambda p: p.bias and p.mask and p.softcap and p.alibi and p.sinks),
        (["bias"], lambda p: p.bias and p.bias.hidden and p.bias.shape == (1, 1) and p.pairs[3] > 1),
        (["bias"], lambda p: p.bias and p.bias.shape == p.pairs and p.pairs[0] == 3 and p.bias.strides == "repeated"),
        (["mask"], lambda p: p.mask and p.mask.hidden == 1.0 and p.pairs[2] * p.pairs[3] > 0),
        (VARIANTS, lambda p: p.score_mod == "table" and p.mask_mod == "padding" and p.dropout_p and p.with_dlse),
        (VARIANTS, lambda p: p.block_mask and p.sinks == "float16" and p.dtype == "float16"),
        (VARIANTS, lambda p: p.alibi == "batch" and p.dtype == "float64" and p.sinks == "float64"),
    ],
)
def test_the_strategy_draws_every_kind_of_variant(variants: Any, condition: Any) -> None:
    find(
        attention_problems(dtypes=DTYPES, variants=variants),
        condition,
        settings=DRAW_MANY,
    )


@pytest.mark.parametrize(
    "condition",
    [
        lambda p: len(p.lengths_q) == 4 and 0 in p.lengths_q and 0 in p.lengths_k,
        lambda p: p.seqused_k and p.seqused_k[0] < p.lengths_k[0] and p.tails == (2, 1),
        lambda p: p.lengths_q[0] > p.lengths_k[0] > 0 and p.causal == "top-left",
        lambda p: p.alibi == "batch" and p.sinks and p.dropout_p and p.heads == (6, 2),
    ],
)
def test_the_strategy_draws_every_kind_of_packed_problem(condition: Any) -> None:
    find(
        packed_problems(variants=PACKED_VARIANTS),
        condition,
        settings=DRAW_MANY,
    )


@pytest.mark.parametrize(
    "condition",
    [
        lambda p: p.q[-2] == 0 and p.layout == "bhsd",
        lambda p: 0 in p.k and 0 not in p.q,
        lambda p: len(p.q) == 4 and p.q[0] == 3 and len(p.k) == 4 and p.k[0] == 1,
        lambda p: len(p.q) == 2 and len(p.k) == 3,
        lambda p: p.causal == "top-left" and p.q[-2] > p.k[-2] and p.layout == "bhsd",
        lambda p: p.window_size is not None and p.window_size[0] is None and p.window_size[1] is not None,
        lambda p: p.q[-1] != p.v[-1],
        lambda p: p.layout == "bshd" and len(p.q) == 4 and p.q[-2] == 6 and p.k[-2] == 2,
        lambda p: p.strides[1:3] == ("negative", "sliced"),
        lambda p: p.dtype == "bfloat16",
        lambda p: p.scale is not None and p.scale < 0,
    ],
)
def test_the_strategy_draws_every_kind_of_problem(condition: Any) -> None:
    find(
        attention_problems(dtypes=DTYPES),
        condition,
        settings=DRAW_MANY,
    )


@pytest.mark.parametrize("strategy", [attention_problems, packed_problems])
@pytest.mark.parametrize(
    ("restriction", "pattern"),
    [
        ({"variants": ["alibi", "alibi_slopes"]}, r"variants: got 'alibi_slopes'; allowed are .*'alibi'"),
        ({"strides": ["sliced", "strided"]}, r"strides: got 'strided'; allowed are .*'sliced'"),
        ({"dtypes": "float32"}, "dtypes: got 'f'; allowed are 'float16'"),
        ({"causal": ["bottom-left"]}, "causal: got 'bottom-left'; allowed are False, True"),
        ({"head_dims": [64, 300]}, "head_dims: got 300; allowed are ints of 1 to 256"),
        ({"group_sizes": [0]}, "group_sizes: got 0; allowed are ints of 1"),
        ({"max_seqlen": -1}, "max_seqlen: got -1; allowed are ints of 0"),
    ],
)
def test_a_name_that_no_problem_would_have_is_refused(strategy: Any, restriction: Any, pattern: str) -> None:
    @settings(derandomize=True, database=None)
    @given(strategy(**restriction))
    def check(problem: Any) -> None: ...

    with pytest.raises(ValueError, match=pattern):
        check()


def test_the_strategy_keeps_to_its_restrictions() -> None:
    @settings(derandomize=True, database=None, deadline=None)
    @given(
        attention_problems(
            dtypes=["float16"], ranks=[3], layouts=["bshd"], max_seqlen=9, head_dims=[4], group_sizes=[1],
            causal=[True], windows=False, scales=[None], strides=["contiguous"],
        )
    )  # fmt: skip
    def check(problem: AttentionProblem) -> None:
        q, k, v = problem.arrays()
        assert all(x.dtype == np.float16 and x.ndim == 3 and x.shape[2] == 4 and len(x) <= 9 for x in (q, k, v))
        assert all(x.flags.c_contiguous for x in (q, k, v))
        assert q.shape[1] == k.shape[1] == v.shape[1]
        assert problem.options == {"scale": None, "causal": True, "window_size": None, "layout": "bshd"}
        assert problem.out_shape == problem.dout().shape == cuflash.attention(q, k, v, **problem.options).shape

    check()


@pytest.mark.parametrize("strides", PAIR_STRIDES)
def test_problems_have_the_strides_they_name(strides: Any) -> None:
    contiguous = AttentionProblem((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4))
    q, *_ = dataclasses.replace(contiguous, strides=(strides,) * 4).arrays()
    expected = {
        "contiguous": (240, 80, 16, 4),
        "transposed": (240, 80, 4, 20),
        "negative": (240, 80, -16, -4),
        "sliced": (756, 252, 36, 8),
        "broadcast": (80, 0, 16, 4),
        "offset": (240, 80, 16, 4),
        "repeated": (48, 16, 0, 4),
    }
    assert q.strides == expected[strides]
    if strides == "broadcast":
        assert (q == q[:, :1]).all()
    elif strides == "repeated":
        assert (q == q[:, :, :1]).all()
    else:
        np.testing.assert_array_equal(q, contiguous.arrays()[0])


def test_problems_are_the_same_every_time() -> None:
    for x, y in zip(PROBLEM.arrays(), PROBLEM.arrays(), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (PROBLEM.arrays()[0] != dataclasses.replace(PROBLEM, seed=1).arrays()[0]).all()
    for problem in (PROBLEM, dataclasses.replace(SMALL, **EVERYTHING), PackedProblem((1, 2), (3, 4), sinks="float16")):
        assert eval(repr(problem)) == problem
    assert repr(SMALL) == "AttentionProblem(q=(2, 4, 5, 3), k=(1, 2, 7, 3), v=(2, 2, 7, 4), dtype='float64')"


def test_the_ten_lines_of_the_documentation_find_a_bug() -> None:
    code = cuflash.testing.__doc__.split(".. code-block:: python\n")[1].split("The problems")[0]
    namespace: dict[str, Any] = {}
    exec(code.replace("\n    ", "\n"), namespace)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    namespace["my_attention"] = lambda q, k, v, **options: cuflash.attention(q, k, v, return_lse=True, **options)
    test = settings(max_examples=30, derandomize=True, database=None, deadline=None)(namespace["test_my_attention"])
    test()
    namespace["my_attention"] = lambda q, k, v, **options: cuflash.attention(q, k, v, return_lse=True)
    with pytest.raises(AssertionError):
        test()


def test_hypothesis_is_needed_for_the_strategies_alone() -> None:
    code = "import cuflash, cuflash.testing, sys; sys.exit('hypothesis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["_accuracy", "_problems", "_reference", "mods", "strategies"])
def test_the_examples_in_the_documentation(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"cuflash.testing.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
