"""Split-KV: how many parts, and that results in parts are those of attention, by every ring that has kernels for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _launch, _parts, _sm80, _sm80_tiles
from cuflash._call import Call
from cuflash._device import Chip
from cuflash._kernel import Kernel, num_places
from cuflash._launch import LaunchBackend
from cuflash._options import PLAIN
from cuflash._problem import FULL, Problem, Window
from cuflash.testing import assert_attention_accurate, assert_attention_varlen_accurate
from cuflash.testing.strategies import PACKED_VARIANTS, VARIANTS, AttentionProblem, PackedProblem
from tests.conftest import HALF, Ring, forget_plans, gpu_ring, host_ring, why_no_gpu
from tests.hostcuda import HostDevice
from tests.hostcuda.device import HOST_CHIP
from tests.test_sm90 import H200, Notebook, put

LARGE_CHIP = replace(HOST_CHIP, multiprocessors=100)


# How many parts


def decode(heads: int = 8, seqlen_q: int = 1, seqlen_k: int = 65536, **changes: Any) -> Problem:
    return replace(Problem("bfloat16", 1, heads, heads, seqlen_q, seqlen_k, 128, 128, 1.0), **changes)


def parts_of(problem: Problem, chip: Chip = H200) -> int:
    kernel, num_jobs = _sm80.forward(problem, PLAIN, problem.dtype, chip)
    tile = _sm80.forward.tile(problem, PLAIN, chip)
    return _parts.num_parts(problem, num_jobs, num_places(kernel, chip), tile.block_m, _parts.MIN_TILES * tile.block_n)


def test_parts_fill_the_chip_and_no_more() -> None:
    places = 2 * H200.multiprocessors
    for heads in range(1, 2 * places):
        assert places // 2 < heads * parts_of(decode(heads)) <= max(places, heads)
    assert parts_of(decode(), replace(H200, multiprocessors=0)) == 1


def test_a_grid_that_fills_more_than_half_of_the_chip_is_not_split() -> None:
    assert parts_of(decode(heads=132)) == 2
    for problem in (decode(heads=133), decode(heads=1, batch=133), decode(heads=8, seqlen_q=8192)):
        assert parts_of(problem) == 1


def test_parts_are_not_shorter_than_is_worth_it() -> None:
    (_, block_n, *_), shortest = _sm80.forward.tile(decode(), PLAIN, H200), _parts.MIN_TILES
    for tiles in (0, 1, shortest, 2 * shortest - 1):
        assert parts_of(decode(seqlen_k=tiles * block_n)) == 1
    assert parts_of(decode(seqlen_k=2 * shortest * block_n)) == 2
    # Keys that nobody sees, and those of other sequences, make no part longer.
    assert parts_of(decode(window=Window.of(False, (100, 0)))) == 1
    assert parts_of(decode(window=Window.of(True, None))) == parts_of(decode(window=FULL)) > 1
    assert parts_of(decode(heads=1, batch=100, packed=True, seqlen_q=100, seqlen_k=100 * 64)) == 1


@pytest.mark.parametrize("lse", [False, True])
def test_the_workspace_does_not_grow_with_the_keys(monkeypatch: pytest.MonkeyPatch, lse: bool) -> None:
    for seqlen in (65536, 131072):
        notebook = put(monkeypatch, Notebook())
        q, kv = np.zeros((8, 1, 64), "float16"), np.zeros((8, seqlen, 64), "float16")
        cuflash.attention(q, kv, kv, kernel="sm80", return_lse=lse)
        assert [symbol[8:23] for symbol in notebook.symbols] == ["fwd_sm80_parts_", "merge_parts_f16"]
        _, num_blocks, arguments = notebook.launches[0]
        assert num_blocks == 33 * 8
        assert [x.shape for x in arguments[3:5]] == [(1, 33 * 8, 1, 64), (1, 33 * 8, 1, 2)]


def test_calls_that_fill_the_chip_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = put(monkeypatch, Notebook())
    x = np.zeros((8, 8192, 64), "float16")
    cuflash.attention(x, x, x, kernel="sm80")
    assert notebook.symbols == ["cuflash_fwd_sm80_f16_d64x64"]


@pytest.mark.parametrize(
    ("heads", "seqlen_q", "seqlen_k", "options", "family"),
    [
        (8, 1, 65536, {}, "sm80"),
        (33, 1, 4096, {}, "sm80"),
        (34, 1, 4096, {}, "sm90"),  # more than a quarter of the chip
        (8, 1, 4095, {}, "sm90"),
        (4, 1024, 8192, {}, "sm80"),
        (8, 1024, 8192, {}, "sm90"),
        (8, 8192, 8192, {"causal": True}, "sm90"),
        (8, 1, 65536, {"window_size": (3000, 0)}, "sm90"),
    ],
)
def test_which_family_decodes_on_a_hopper(
    monkeypatch: pytest.MonkeyPatch, heads: int, seqlen_q: int, seqlen_k: int, options: dict[str, Any], family: str
) -> None:
    notebook = put(monkeypatch, Notebook())
    q, kv = np.zeros((heads, seqlen_q, 128), "float16"), np.zeros((heads, seqlen_k, 128), "float16")
    cuflash.attention(q, kv, kv, **options)
    assert notebook.symbols[0].startswith(f"cuflash_fwd_{family}")
    cuflash.attention(q, kv, kv, kernel="sm90", **options)
    assert notebook.symbols[-1].startswith("cuflash_fwd_sm90")


# What they give


@pytest.fixture(
    params=[
        pytest.param(
            "host", marks=[pytest.mark.host, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]
        ),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    """A ring on whose chip the keys of small problems are shared out too; the test fails if none were."""
    if request.param == "gpu" and why_no_gpu() is not None:
        pytest.skip(str(why_no_gpu()))
    for tiles in (_sm80_tiles.FORWARD_TILES, _sm80_tiles.FLOAT32_FORWARD_TILES):
        for key in tiles:  # short ones, so that there are several
            monkeypatch.setitem(tiles, key, (_sm80_tiles.SMALLEST,))
    for tiles in (_sm80_tiles.FRUGAL_TILES, _sm80_tiles.FLOAT32_FRUGAL_TILES, _sm80_tiles.SHORT_TILES):
        for key in tuple(tiles):
            monkeypatch.delitem(tiles, key)
    monkeypatch.setattr(_parts, "MIN_TILES", 1)
    monkeypatch.setattr(_launch, "AUTO", ("sm80", "wmma"))
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(HostDevice(chip=LARGE_CHIP)))
    counts = []

    def plan_forward(call: Call, made: tuple[Kernel, int], count: int, plan: Any = _parts.plan_forward) -> Any:
        counts.append(count)
        return plan(call, made, count)

    monkeypatch.setattr(_parts, "plan_forward", plan_forward)
    forget_plans()
    yield host_ring("auto") if request.param == "host" else gpu_ring("sm80")
    forget_plans()
    assert counts


def test_random_problems_are_accurate(parts: Ring) -> None:
    @parts.given(
        dtypes=(*HALF, "float32"), variants=VARIANTS, max_seqlen=129, examples=8 if parts.name == "host" else 16
    )
    def check(problem: AttentionProblem) -> None:
        parts.check_forward(problem)

    check()


def test_packed_sequences_are_accurate(parts: Ring) -> None:
    examples = 3 if parts.name == "host" else 6

    @parts.given(packed=True, dtypes=(*HALF, "float32"), variants=PACKED_VARIANTS, max_seqlen=129, examples=examples)
    def check(problem: PackedProblem) -> None:
        out, lse = parts.attention_varlen(*problem.arrays(parts.xp), return_lse=True, **parts.options(problem))
        assert_attention_varlen_accurate(*problem.arrays(), out, lse, **problem.options)

    check()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": "top-left"}, {"window_size": (70, 5)}], ids=str)
def test_few_queries_and_many_keys(parts: Ring, options: dict[str, Any]) -> None:
    for seqlen_q in (1, 70):
        problem = AttentionProblem((2, 4, seqlen_q, 32), (2, 2, 1000, 32), (2, 2, 1000, 32), "bfloat16", **options)
        parts.check_forward(problem)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (70, 5)}, {"mask": True}], ids=str)
def test_nan_reaches_the_rows_that_see_it_and_no_others(parts: Ring, options: dict[str, Any], dtype: str) -> None:
    """Rows are computed again from the keys of their part alone."""
    q, k, v = AttentionProblem((2, 70, 32), (2, 300, 32), (2, 300, 32), dtype).arrays()
    if "mask" in options:
        options = {"mask": np.random.default_rng(0).random((70, 300)) < 0.5}
    for key in (40, 270):
        v[0, key] = np.nan
    v[1, 290] = np.inf
    given = {name: parts.asarray(x) if name == "mask" else x for name, x in options.items()}
    out, lse = parts.attention(*map(parts.asarray, (q, k, v)), return_lse=True, **given)
    assert_attention_accurate(q, k, v, out, lse, **options)
    assert np.isfinite(parts.numpy(out).astype(float)).any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("offset", [2.0**16, -(2.0**22), -1e9, -1e30])
def test_parts_of_large_scores_keep_their_shares(parts: Ring, offset: float, dtype: str) -> None:
    """The lse of a part would lose the log of its sum beside them."""
    q, k, v = AttentionProblem((2, 70, 32), (2, 330, 32), (2, 330, 32), dtype).arrays()
    q[:] = 0
    step = max(1.0, abs(offset) / 2**22)
    bias = (offset + step * np.random.default_rng(0).integers(0, 3, (70, 330))).astype(np.float32)
    out, lse = parts.attention(*map(parts.asarray, (q, k, v)), bias=parts.asarray(bias), return_lse=True)
    assert_attention_accurate(q, k, v, out, lse, bias=bias)


def test_a_sink_counts_once(parts: Ring) -> None:
    q, k, v = (np.zeros((1, rows, 32), "float16") for rows in (1, 300, 300))
    _, lse = parts.attention(*map(parts.asarray, (q, k, v)), sinks=parts.asarray(np.zeros(1, "f4")), return_lse=True)
    np.testing.assert_allclose(parts.numpy(lse), np.log(301), rtol=1e-6)


def test_the_same_bits_again_and_without_the_lse(parts: Ring) -> None:
    arrays = AttentionProblem((2, 4, 70, 32), (2, 2, 300, 32), (2, 2, 300, 32), "float16").arrays(parts.xp)
    out, lse = parts.attention(*arrays, causal=True, return_lse=True)
    for _ in range(3):
        again, lse_again = parts.attention(*arrays, causal=True, return_lse=True)
        parts.assert_same_bits(again, out)
        parts.assert_same_bits(lse_again, lse)
    parts.assert_same_bits(parts.attention(*arrays, causal=True), out)
