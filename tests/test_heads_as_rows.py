"""Decoding: query heads that share keys and values are rows of one tile, and results are those of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash.testing import assert_attention_accurate
from cuflash.testing.strategies import AttentionProblem
from tests.conftest import Ring
from tests.test_sm90 import Notebook, put


def num_blocks(monkeypatch: pytest.MonkeyPatch, rows: int = 1, layout: str = "bhsd", **options: Any) -> int:
    """The blocks of threads of a call with 2 sequences, 32 query heads and 4 key/value heads, one for each tile."""
    notebook = put(monkeypatch, Notebook())
    shapes = [(2, 32, rows, 64), (2, 4, 192, 64)]
    q, kv = (np.zeros(shape if layout == "bhsd" else (2, shape[2], shape[1], 64), "float16") for shape in shapes)
    cuflash.attention(q, kv, kv, layout=layout, kernel="sm80", **options)
    _, count, _ = notebook.launches[0]
    return count


ALONE, TOGETHER = 2 * 32, 2 * 4


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (191, 0)}, {"softcap": 5.0}])
def test_heads_of_a_group_share_a_tile(monkeypatch: pytest.MonkeyPatch, layout: str, options: dict[str, Any]) -> None:
    assert num_blocks(monkeypatch, layout=layout, **options) == TOGETHER


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (190, 0)},
        {"causal": "top-left"},
        {"dropout_p": 0.5, "seed": 1},
        {"alibi_slopes": np.ones(32, "float32")},
        {"sinks": np.ones(32, "float32")},
        {"bias": np.ones((32, 1, 192), "float16")},
        {"score_mod": "score + h"},
        {"rows": 2, "causal": True},
        {"rows": 64},
        {"rows": 2, "layout": "bshd"},
    ],
)
def test_heads_that_differ_do_not(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    assert num_blocks(monkeypatch, **options) == ALONE


def test_a_few_rows_of_each_head_share_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(monkeypatch, rows=2) == TOGETHER


def test_results_are_those_of_each_head_on_its_own(ring: Ring) -> None:
    @settings(max_examples=ring.examples, derandomize=True, database=None, deadline=None)
    @given(
        rows=st.integers(1, 9),
        group=st.integers(2, 5),
        layout=st.sampled_from(["bhsd", "bshd"]),
        causal=st.booleans(),
        dtype=st.sampled_from(["float16", "float32"]),
        every_other=st.sampled_from([None, 1, 2]),
    )
    def check(rows: int, group: int, layout: Any, causal: bool, dtype: str, every_other: int | None) -> None:
        shapes = [(2, heads, length, 16) for heads, length in ((2 * group, rows), (2, 37), (2, 37))]
        if layout == "bshd":
            shapes = [(batch, length, heads, dim) for batch, heads, length, dim in shapes]
        q_shape, kv_shape, _ = shapes
        q, k, v = AttentionProblem(q_shape, kv_shape, kv_shape, dtype, layout=layout).arrays(ring.xp)
        if every_other is not None:  # heads or rows of a larger array: rows no longer follow each other
            part = tuple(slice(None, None, 2 if axis == every_other else 1) for axis in range(4))
            q = ring.xp.repeat(q, 2, axis=every_other)[part]
        out, lse = ring.attention(q, k, v, layout=layout, causal=causal, return_lse=True)
        assert_attention_accurate(q, k, v, out, lse, layout=layout, causal=causal)

    check()
