"""What is particular to the NumPy backend: blocks, memory, and no CuPy."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _numpy
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem


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


def test_a_problem_of_several_blocks() -> None:
    seqlen = 3 * _numpy.BLOCK_ROWS + 1
    problem = AttentionProblem((1, seqlen, 8), (1, seqlen, 8), (1, seqlen, 8), causal=True)
    arrays, dout = problem.arrays(), problem.dout()
    out, lse = cuflash.attention(*arrays, return_lse=True, causal=True)
    assert_attention_accurate(*arrays, out, lse, causal=True)
    gradients = cuflash.attention_backward(dout, *arrays, out, lse, causal=True)
    assert_gradients_accurate(dout, *arrays, *gradients, causal=True)


def visited(problem: Any) -> list[tuple[int, int, int, int, bool]]:
    return [
        (queries.start, queries.stop, keys.start, keys.stop, hidden is not None)
        for queries in _numpy._query_blocks(problem)
        for keys, hidden in _numpy._key_blocks(problem, queries)
    ]


def test_hidden_blocks_are_skipped_and_full_ones_are_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash._problem import Band, Problem

    monkeypatch.setattr(_numpy, "BLOCK_ROWS", 10)
    monkeypatch.setattr(_numpy, "BLOCK_KEYS", 10)

    def problem(causal: Any, window_size: Any) -> Problem:
        return Problem("float32", 1, 1, 1, 30, 30, 8, 8, 1.0, Band.of(30, 30, causal, window_size))

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


def test_inputs_are_not_copied_whole() -> None:
    q = np.zeros((1, 8), np.float16)
    k = np.zeros((200_000, 8), np.float16)
    peak = peak_memory(lambda: cuflash.attention(q, k[::-1], k[::-1]))
    assert peak < k.nbytes / 2


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
