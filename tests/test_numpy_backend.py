"""What is particular to the NumPy backend: blocks, memory, and no CuPy."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np
import pytest

import cuflash
from cuflash import _numpy
from cuflash._numpy_pairs import Block, Pairs
from cuflash._problem import Problem, Window
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem, PairArray


def peak_memory(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds at once, its results included."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def materialised(q: Any, k: Any, v: Any) -> Any:
    """Plain NumPy attention, sparing with memory."""
    scores = q @ k.swapaxes(-1, -2)
    scores *= q.dtype.type(q.shape[-1] ** -0.5)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores @ v


@pytest.mark.parametrize("block", [(1, 1), (3, 5), (16, 7), (_numpy.BLOCK_ROWS, _numpy.BLOCK_KEYS)])
@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize("window_size", [None, (9, 4)])
def test_block_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch, block: Any, causal: Any, window_size: Any) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", block[0])
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", block[1])
    for seqlen_q, seqlen_k in ((30, 30), (30, 41), (41, 30)):
        shapes = ((2, 6, seqlen_q, 8), (2, 2, seqlen_k, 8), (2, 2, seqlen_k, 5))
        problem = AttentionProblem(*shapes, causal=causal, window_size=window_size)
        arrays, dout = problem.arrays(), problem.dout()
        out, lse = cuflash.attention(*arrays, return_lse=True, **problem.options)
        assert_attention_accurate(*arrays, out, lse, **problem.options)
        gradients = cuflash.attention_backward(dout, *arrays, out, lse, **problem.options)
        assert_gradients_accurate(dout, *arrays, *gradients, **problem.options)


# One of every option, with grouped heads.
VARIANT = AttentionProblem(
    (2, 6, 30, 8),
    (2, 2, 200, 8),
    (2, 2, 200, 5),
    causal=True,
    softcap=2.0,
    alibi="batch",
    bias=PairArray((2, 1, 30, 200)),
    mask=PairArray((6, 1, 200), hidden=0.2),
    block_mask=True,
    sinks="float32",
    dropout_p=0.3,
    score_mod="square",
    mask_mod="stripes",
    with_dlse=True,
)


@pytest.mark.parametrize("block", [(11, 37), (16, 64), (_numpy.BLOCK_ROWS, _numpy.BLOCK_KEYS)])
def test_block_sizes_do_not_matter_to_any_option(monkeypatch: pytest.MonkeyPatch, block: Any) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", block[0])
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", block[1])
    arrays, options = VARIANT.arrays(), VARIANT.options
    (out, lse), vjp = cuflash.attention_vjp(*arrays, return_lse=True, return_dbias=True, return_dsinks=True, **options)
    assert_attention_accurate(*arrays, out, lse, **options)
    dout, dlse = VARIANT.dout(), VARIANT.dlse()
    dq, dk, dv, dbias, dsinks = vjp(dout, dlse)
    assert_gradients_accurate(dout, *arrays, dq, dk, dv, dbias=dbias, dsinks=dsinks, dlse=dlse, **options)


def test_a_problem_of_several_blocks() -> None:
    seqlen = max(_numpy.BLOCK_ROWS, 2 * _numpy.BLOCK_KEYS) + 1
    problem = AttentionProblem((1, seqlen, 8), (1, seqlen, 8), (1, seqlen, 8), causal=True)
    arrays, dout = problem.arrays(), problem.dout()
    out, lse = cuflash.attention(*arrays, return_lse=True, causal=True)
    assert_attention_accurate(*arrays, out, lse, causal=True)
    gradients = cuflash.attention_backward(dout, *arrays, out, lse, causal=True)
    assert_gradients_accurate(dout, *arrays, *gradients, causal=True)


ONE_HEAD = slice(0, 1)


def visited(problem: Problem, **options: Any) -> list[tuple[int, int, int, int, bool]]:
    """Return the blocks of scores that are computed, and whether they are masked."""
    pairs = Pairs(problem, np.dtype("float32"), 0, **options)
    return [
        (queries.start, queries.stop, keys.start, keys.stop, pairs.hidden(Block(ONE_HEAD, queries, keys)) is not None)
        for queries in _numpy._query_blocks(problem)
        for keys in _numpy._key_blocks(pairs, ONE_HEAD, queries)
    ]


def test_hidden_blocks_are_skipped_and_full_ones_are_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", 10)
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", 10)

    def problem(causal: Any, window_size: Any) -> Problem:
        return Problem("float32", 1, 1, 1, 30, 30, 8, 8, 1.0, Window.of(causal, window_size))

    assert visited(problem(True, None)) == [
        (0, 10, 0, 10, True),
        (10, 20, 0, 10, False),
        (10, 20, 10, 20, True),
        (20, 30, 0, 10, False),
        (20, 30, 10, 20, False),
        (20, 30, 20, 30, True),
    ]
    assert not any(masked for *_, masked in visited(problem(False, None)))
    assert [keys for *keys, _ in visited(problem(False, (2, 0)))] == [
        [0, 10, 0, 10],
        [10, 20, 8, 18],
        [10, 20, 18, 20],
        [20, 30, 18, 28],
        [20, 30, 28, 30],
    ]


def test_blocks_that_a_block_mask_hides_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", 128)
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", 256)
    visible = np.array([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]], bool)
    block_mask = cuflash.BlockMask.from_blocks(visible, visible, shape=(300, 600))
    problem = Problem("float32", 1, 1, 1, 300, 600, 8, 8, 1.0)
    assert visited(problem, block_mask=block_mask) == [
        (0, 128, 0, 128, False),
        (0, 128, 256, 512, False),
        (0, 128, 512, 600, False),
        (256, 300, 0, 256, False),
        (256, 300, 512, 600, False),
    ]


def test_masks_are_looked_at_only_where_a_block_is_seen_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", 128)
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", 128)
    looked_at = []

    def causal(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        looked_at.append((int(q_idx[0, 0]), int(kv_idx[0])))
        return q_idx >= kv_idx

    problem = AttentionProblem((300, 8), (300, 8), (300, 8))
    block_mask = cuflash.make_block_mask(mask_mod=causal, shape=(1, 1, 300, 300))
    looked_at.clear()
    out, vjp = cuflash.attention_vjp(*problem.arrays(), mask_mod=causal, block_mask=block_mask)
    assert looked_at == [(0, 0), (128, 128), (256, 256)]
    dq, dk, dv = vjp(problem.dout())
    assert looked_at == 2 * [(0, 0), (128, 128), (256, 256)]
    assert_attention_accurate(*problem.arrays(), out, causal=True)
    assert_gradients_accurate(problem.dout(), *problem.arrays(), dq, dk, dv, causal=True)


def test_callables_get_arrays_that_broadcast() -> None:
    shapes = []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        shapes.append(tuple(x.shape for x in (score, b, h, q_idx, kv_idx)))
        return score

    def mask_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        assert score is None
        shapes.append(tuple(x.shape for x in (b, h, q_idx, kv_idx)))
        return np.bool_(True)

    q, k, v = np.ones((3, 2, 4, 5, 8), np.float32)
    out, vjp = cuflash.attention_vjp(q, k, v, score_mod=score_mod, mask_mod=mask_mod)
    vjp(out)
    indices = ((1, 1, 1, 1), (1, 4, 1, 1), (5, 1), (5,))
    assert set(shapes) == {((1, 4, 5, 5), *indices), indices}


def test_what_a_callable_returns_stays_its_own() -> None:
    table = np.zeros((1, 1, 5, 5), np.float32)
    given: list[Any] = []

    def constant(score: Any, *indices: Any) -> Any:
        given.append(score)
        return table

    problem = AttentionProblem((5, 8), (5, 8), (5, 8))
    out, vjp = cuflash.attention_vjp(*problem.arrays(), score_mod=constant)
    np.testing.assert_allclose(out, np.broadcast_to(problem.arrays()[2].mean(axis=0), (5, 8)), rtol=1e-6)
    dq, dk, _ = vjp(problem.dout())
    assert (table == 0).all() and (dq == 0).all() and (dk == 0).all()


def test_a_score_mod_may_work_in_place() -> None:
    def in_place(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        score *= 0.5
        score += 0.25 * (q_idx - kv_idx)
        return score

    def pure(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * 0.5 + 0.25 * (q_idx - kv_idx)

    problem = AttentionProblem((2, 9, 8), (2, 9, 8), (2, 9, 8))
    results = []
    for score_mod in (in_place, pure):
        out, vjp = cuflash.attention_vjp(*problem.arrays(), score_mod=score_mod, softcap=3.0)
        results.append((out, *vjp(problem.dout())))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_nan_in_hidden_scores_and_their_slopes_is_inert() -> None:
    def nan_above(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * np.where(kv_idx > q_idx, np.nan, 1.0)

    problem = AttentionProblem((9, 8), (9, 8), (9, 8))
    out, vjp = cuflash.attention_vjp(*problem.arrays(), score_mod=nan_above, causal=True)
    assert_attention_accurate(*problem.arrays(), out, causal=True)
    assert_gradients_accurate(problem.dout(), *problem.arrays(), *vjp(problem.dout()), causal=True)


@pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
def test_a_callable_that_returns_a_wrong_shape_is_named(name: str) -> None:
    q = np.ones((2, 5, 8), np.float32)
    options: dict[str, Any] = {name: lambda *_: np.ones(3)}
    with pytest.raises(ValueError, match=rf"{name}: returned shape \(3,\).*\(1, 2, 5, 5\)"):
        cuflash.attention(q, q, q, **options)


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("score_mod", None, r"object.*real numbers.*return"),
        ("score_mod", 1j, r"complex128.*real numbers"),
        ("score_mod", "1", r"<U1.*real numbers"),
        ("mask_mod", None, r"object.*bool and int.*return"),
        ("mask_mod", np.zeros((5, 5)), r"float64.*bool and int"),  # 0 and -inf, as a bias has it
        ("mask_mod", "1", r"<U1.*bool and int"),
    ],
)
def test_a_callable_that_returns_a_wrong_kind_is_named(name: str, value: Any, pattern: str) -> None:
    q = np.ones((2, 5, 8), np.float32)
    options: dict[str, Any] = {name: lambda *_: value}
    for call in (cuflash.attention, cuflash.attention_vjp):
        with pytest.raises(TypeError, match=rf"{name}: returned .*{pattern}"):
            call(q, q, q, **options)
    if name == "mask_mod":
        with pytest.raises(TypeError, match=rf"{name}: returned .*{pattern}"):
            cuflash.make_block_mask(**options, shape=(1, 2, 5, 5))


def test_scores_of_bfloat16_and_masks_of_int_are_taken() -> None:
    q = np.ones((2, 5, 8), np.float32)
    shown = np.tri(5, dtype=np.uint8)
    masked = cuflash.attention(q, q, q, mask_mod=lambda s, b, h, i, j: shown[i, j])
    np.testing.assert_array_equal(masked, cuflash.attention(q, q, q, causal=True))
    bias = np.ones((5, 5), "bfloat16")
    cuflash.attention(q, q, q, score_mod=lambda s, b, h, i, j: bias[i, j])


def test_gradients_of_broadcast_arrays_are_summed_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", 3)
    q = np.zeros((1, 1, 5000, 8), np.float16)
    bias, sinks = np.zeros((1, 1), np.float16), np.zeros(1, np.float16)
    (_, lse), vjp = cuflash.attention_vjp(
        q, q[:, :, :1], q[:, :, :1], bias=bias, sinks=sinks, return_lse=True, return_dbias=True, return_dsinks=True
    )
    *_, dbias, dsinks = vjp(np.zeros_like(q), np.ones_like(lse))
    assert dbias.item() == 2500 and dsinks.item() == 2500  # in float16, 2048 + 1.5 is 2050


def test_memory_is_a_tenth_of_plain_attention() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 4096, 64), np.float32)
    blocked = peak_memory(lambda: cuflash.attention(q, k, v))
    assert blocked <= peak_memory(lambda: materialised(q, k, v)) / 10


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    def extra(seqlen: int, backward: bool) -> int:
        q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 1, seqlen, 8), np.float32)
        out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
        if backward:
            return peak_memory(lambda: cuflash.attention_backward(dout, q, k, v, out, lse, causal=True))
        return peak_memory(lambda: cuflash.attention(q, k, v, causal=True, out=out))

    for backward in (False, True):
        small, large = extra(1024, backward), extra(4096, backward)
        linear = 4096 * 8 * 4 * 6 if backward else 0  # the gradients, and their sums
        assert large <= small + linear + 4096


@pytest.mark.parametrize("name", ["bias", "mask", "alibi_slopes", "sinks", "dropout", "mods", "block_mask"])
def test_no_option_takes_memory_for_all_pairs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_numpy, "BLOCK_ROWS", 128)
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", 128)
    seqlen = 2048
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 1, seqlen, 8), np.float32)
    all_pairs = (1, 1, seqlen, seqlen)
    every: dict[str, dict[str, Any]] = {
        "bias": {"bias": np.zeros((seqlen, 1), np.float32)},
        "mask": {"mask": np.broadcast_to(np.True_, all_pairs)},
        "alibi_slopes": {"alibi_slopes": np.ones(1, np.float32)},
        "sinks": {"sinks": np.ones(1, np.float32)},
        "dropout": {"dropout_p": 0.5, "seed": 1},
        "mods": {"score_mod": lambda s, b, h, i, j: s * 2, "mask_mod": lambda s, b, h, i, j: (i + j) % 2 == 0},
        "block_mask": {"block_mask": cuflash.BlockMask.from_blocks(np.ones((16, 16), bool), shape=(seqlen, seqlen))},
    }

    def call() -> None:
        _, vjp = cuflash.attention_vjp(q, k, v, return_dbias=name == "bias", **every[name])
        vjp(dout)

    assert peak_memory(call) < seqlen * seqlen / 2  # bytes


def test_arrays_in_files_are_arrays(tmp_path: Path) -> None:
    def in_file(x: Any, name: str) -> Any:
        array = np.memmap(tmp_path / name, x.dtype, "w+", shape=x.shape)
        array[...] = x
        return array

    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 2, 9, 8), dtype=np.float32)
    options = {"mask": np.tri(9, dtype=bool), "sinks": np.ones(2, np.float32)}
    expected, vjp = cuflash.attention_vjp(q, k, v, **options)
    arrays = [in_file(x, name) for x, name in zip((q, k, v), "qkv", strict=True)]
    stored = {name: in_file(x, name) for name, x in options.items()}
    out = in_file(np.zeros_like(q), "out")
    assert cuflash.attention(*arrays, **stored, out=out) is out
    np.testing.assert_array_equal(out, expected)
    result, vjp_of_stored = cuflash.attention_vjp(*arrays, **stored)
    np.testing.assert_array_equal(result, expected)
    for actual, gradient in zip(vjp_of_stored(in_file(dout, "dout")), vjp(dout), strict=True):
        np.testing.assert_array_equal(actual, gradient)


def test_inputs_are_not_copied_whole() -> None:
    q = np.zeros((1, 8), np.float16)
    k = np.zeros((200_000, 8), np.float16)
    peak = peak_memory(lambda: cuflash.attention(q, k[::-1], k[::-1]))
    assert peak < k.nbytes / 2


@pytest.mark.parametrize(("scale", "q_factor", "k_factor"), [(1e9, 1e30, 1e-38), (1e37, 1e3, 1e-37)])
def test_the_scale_may_be_too_large_for_a_factor(scale: float, q_factor: float, k_factor: float) -> None:
    shape = (2, 17, 8)
    problem = AttentionProblem(shape, shape, shape, scale=scale)
    (q, k, v), dout = problem.arrays(), problem.dout() * np.float32(1e-3)
    arrays = q * np.float32(q_factor), k * np.float32(k_factor), v
    (out, lse), vjp = cuflash.attention_vjp(*arrays, return_lse=True, scale=scale)
    assert_attention_accurate(*arrays, out, lse, scale=scale)
    assert_gradients_accurate(dout, *arrays, *vjp(dout), scale=scale)


def test_cupy_is_not_imported() -> None:
    code = """
import sys, numpy as np, cuflash, cuflash.testing
q = np.zeros((4, 8), np.float32)
out, vjp = cuflash.attention_vjp(q, q, q)
vjp(out)
sys.exit(any(name.split('.')[0] in ('cupy', 'hypothesis', 'ml_dtypes') for name in sys.modules))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_warning_is_given_for_rows_without_keys() -> None:
    q, k, v = AttentionProblem((9, 8), (4, 8), (4, 8)).arrays()
    with np.errstate(all="raise"):
        out, vjp = cuflash.attention_vjp(q, k, v, causal=True)
        vjp(out)


def test_gradients_of_a_bias_overflow_as_all_others_do() -> None:
    q, k, v = (x.astype(np.float16) for x in np.random.default_rng(0).standard_normal((3, 10, 8)))
    _, vjp = cuflash.attention_vjp(q, k, v * 1000, bias=np.zeros((10, 10), np.float16), return_dbias=True)
    with np.errstate(all="raise"):
        gradients = vjp(np.full_like(v, 500))
    assert np.isinf(gradients[3]).any()
