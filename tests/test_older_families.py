"""The older ways to compute attention: FlashAttention-1 as a kernel, and plain array code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _fa1
from cuflash._cli.bench import cells, plots, records, sweeps, tables
from cuflash._cli.bench.cpu import Cpu
from cuflash._cli.bench.timing import measure_in_turn
from cuflash._device import Chip
from cuflash._kernel import HEAD_DIMS, NUMBERS
from cuflash._launch import LaunchBackend
from cuflash._problem import Problem
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem
from tests import cubin
from tests.conftest import Ring, gpu_ring, host_backend, host_ring, why_no_gpu
from tests.hostcuda import CompileError, HostCudaError, HostDevice
from tests.hostcuda.build import can_instrument
from tests.hostcuda.sources import CUDA_SRC
from tests.mistakes import seed_mistake
from tests.test_docs import ALGORITHM, table

FAMILIES = ("fa1", "naive")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the host ring needs g++")


@pytest.fixture(
    params=[pytest.param("host", marks=[pytest.mark.host, needs_compiler]), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the calls of a test are computed."""
    if request.param == "host":
        monkeypatch.setattr(_backends, "numpy_backend", host_backend())
    elif why_no_gpu() is not None:
        pytest.skip(str(why_no_gpu()))
    name: str = request.param
    return name


def ring_of(place: str, family: str) -> Ring:
    return host_ring(family) if place == "host" else gpu_ring(family)


@pytest.fixture(params=FAMILIES)
def older(request: pytest.FixtureRequest, place: str) -> Ring:
    return ring_of(place, request.param)


@pytest.fixture
def naive(place: str) -> Ring:
    return ring_of(place, "naive")


@pytest.fixture
def fa1(place: str) -> Ring:
    return ring_of(place, "fa1")


MORE_LENGTHS = [pytest.param(*lengths, marks=pytest.mark.thorough_on_host) for lengths in ((300, 1), (150, 400))]


class TestForward:
    def test_random_problems_are_accurate(self, older: Ring) -> None:
        @older.given()
        def check(problem: AttentionProblem) -> None:
            older.check_forward(problem)

        check()

    @pytest.mark.parametrize("causal", [False, True, "top-left"])
    @pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 300), (129, 129), (300, 270), *MORE_LENGTHS])
    def test_several_tiles_of_keys_and_queries(self, older: Ring, seqlen_q: int, seqlen_k: int, causal: Any) -> None:
        q, kv = (4, seqlen_q, 32), (2, seqlen_k, 32)
        for dtype in older.dtypes:
            older.check_forward(AttentionProblem(q, kv, kv, dtype, causal=causal))

    @pytest.mark.parametrize("window", [(0, 0), (5, 3), (150, 1), (7, None), (None, 20)])
    def test_windows(self, older: Ring, window: Any) -> None:
        for seqlen_q, seqlen_k in ((300, 300), (140, 300), (300, 140)):
            q, kv = (seqlen_q, 8), (seqlen_k, 8)
            older.check_forward(AttentionProblem(q, kv, kv, window_size=window))

    def test_every_head_dim(self, older: Ring) -> None:
        for head_dim, head_dim_v in older.head_dim_pairs:
            q, k, v = (2, 2, 66, head_dim), (2, 1, 130, head_dim), (2, 1, 130, head_dim_v)
            older.check_forward(AttentionProblem(q, k, v, "float16", causal=True))

    @pytest.mark.parametrize("growth", [0.05, 20.0])
    def test_the_largest_score_comes_first_or_last(self, older: Ring, growth: float) -> None:
        for dtype in older.dtypes:
            q, k, v = AttentionProblem((70, 32), (500, 32), (500, 32), dtype).arrays()
            k = (k * np.linspace(1, growth, 500)[:, None]).astype(k.dtype)
            out, lse = older.attention(*map(older.asarray, (q, k, v)), return_lse=True)
            assert_attention_accurate(q, k, v, out, lse)

    def test_empty_arrays(self, older: Ring) -> None:
        for q, kv in (((0, 8), (5, 8)), ((5, 8), (0, 8)), ((0, 3, 5, 8), (0, 3, 4, 8))):
            out, lse = older.attention(*AttentionProblem(q, kv, kv).arrays(older.xp), return_lse=True)
            assert (older.numpy(out) == 0).all()
            assert np.isneginf(older.numpy(lse)).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_fa1_keeps_nan_and_infinity_where_they_are_seen(self, fa1: Ring, name: str, value: float) -> None:
        for dtype in ("float16", "float32"):
            arrays = dict(
                zip("qkv", AttentionProblem((2, 140, 8), (2, 200, 8), (2, 200, 8), dtype).arrays(), strict=True)
            )
            arrays[name][0, 135, 3] = value
            q, k, v = arrays.values()
            out, lse = fa1.attention(*map(fa1.asarray, (q, k, v)), return_lse=True, causal=True)
            assert_attention_accurate(q, k, v, out, lse, causal=True)


class TestNaiveBackward:
    def test_random_problems_are_accurate(self, naive: Ring) -> None:
        @naive.given()
        def check(problem: AttentionProblem) -> None:
            naive.check_backward(problem)

        check()


class TestNaiveOptions:
    """Those that cost plain array code one line each."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {
            "softcap": 1.5,
            "alibi_slopes": rng.uniform(0, 1, (2, 4)).astype(np.float32),
            "bias": rng.standard_normal((4, 1, 50)).astype(np.float32),
            "mask": rng.random((2, 1, 40, 50)) < 0.7,
            "sinks": rng.standard_normal(4).astype(np.float32),
        }

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("name", ["softcap", "alibi_slopes", "bias", "mask", "sinks", "all"])
    def test_is_accurate(self, naive: Ring, options: dict[str, Any], name: str, dtype: str) -> None:
        problem = AttentionProblem((2, 4, 40, 8), (2, 2, 50, 8), (2, 2, 50, 8), dtype)
        (q, k, v), dout = problem.arrays(), problem.dout()
        chosen = options if name == "all" else {name: options[name]}
        placed = {key: naive.asarray(x) if isinstance(x, np.ndarray) else x for key, x in chosen.items()}
        dlse = np.random.default_rng(1).standard_normal((2, 4, 40)).astype(np.float32)

        wanted = {f"return_d{key}": True for key in ("bias", "sinks") if key in chosen}
        (out, lse), vjp = naive.attention_vjp(*map(naive.asarray, (q, k, v)), return_lse=True, **placed, **wanted)
        assert_attention_accurate(q, k, v, out, lse, **chosen)
        dq, dk, dv, *more = vjp(naive.asarray(dout), naive.asarray(dlse))
        judged = dict(zip((key.removeprefix("return_") for key in wanted), more, strict=True))
        assert_gradients_accurate(dout, q, k, v, dq, dk, dv, dlse=dlse, **judged, **chosen)

    def test_a_sink_without_keys(self, naive: Ring) -> None:
        q, kv = naive.asarray(np.ones((2, 5, 8), np.float32)), naive.asarray(np.ones((2, 0, 8), np.float32))
        sinks = naive.asarray(np.array([0.5, -1], np.float32))
        out, lse = naive.attention(q, kv, kv, sinks=sinks, return_lse=True)
        assert (naive.numpy(out) == 0).all()
        assert (naive.numpy(lse) == [[0.5] * 5, [-1] * 5]).all()


class TestRefusals:
    def test_what_is_missing_is_named(self, place: str) -> None:
        x = ring_of(place, "fa1").asarray(np.ones((2, 5, 8), np.float32))
        for family, options, named in (
            ("fa1", {"softcap": 2.0}, "fa1: it has no softcap"),
            ("fa1", {"sinks": x[:, 0, 0]}, "fa1: it has no sinks"),
            ("fa1", {"dropout_p": 0.5, "seed": 1}, "fa1: it has no dropout"),
            ("naive", {"dropout_p": 0.5, "seed": 1}, "naive: it has no dropout"),
        ):
            with pytest.raises(NotImplementedError, match=named):
                cuflash.attention(x, x, x, kernel=family, **options)

    def test_fa1_has_no_backward(self, fa1: Ring) -> None:
        x = fa1.asarray(np.ones((5, 8), np.float32))
        out, lse = fa1.attention(x, x, x, return_lse=True)
        with pytest.raises(NotImplementedError, match="wmma"):
            fa1.attention_backward(x, x, x, x, out, lse)


# On a chip with so little shared memory a tile has 64 keys and 64 queries.
SMALL_CHIP = Chip("small", (9, 0), 64 << 10)

MISTAKES = [
    ("O, m and l have begun, and", "__syncthreads();  // O, m and l have begun", "//", ("greedy", "tsan")),
    ("Q has arrived", "__syncthreads();  // Q has arrived", "//", ("tsan",)),
    ("Q is no longer read", "__syncthreads();  // Q is no longer read", "//", ("greedy", "tsan")),
    ("wait for the next Q", "map.stay_packed();\n        ptx::cp_async_wait<0>();", "map.stay_packed();", ("lazy",)),
    ("P is visible", "__syncwarp();  // P is visible to its warp", "//", ("tsan",)),
    ("rescale O", "scale_rows(acc_o, map, old_sum);", "", ("forward",)),
    ("keep m", "head_max[row] = softmax.base;", "", ("forward",)),
    ("rows of the last tile", "row < out.rows && ", "", ("asan",)),
    ("the mask of careful products", "!band.visible(warp_row + map.row(i), key) || ", "", ("forward",)),
]
WAYS: dict[str, dict[str, Any]] = {
    "forward": {},
    "greedy": {"schedule": "greedy"},
    "lazy": {"cp_async": "lazy"},
    "asan": {"flavour": "asan"},
    "tsan": {"flavour": "tsan"},
}


def check_on(way: str, cuda_src: Path) -> None:
    """Compute a problem of several tiles with fa1, in which one value is NaN."""
    device = HostDevice(SMALL_CHIP, **WAYS[way], isolated=True, timeout=60, cuda_src=cuda_src)
    if not can_instrument(device.flavour):
        pytest.skip(f"the compiler cannot link {device.flavour}")
    q, k, v = AttentionProblem((2, 150, 64), (1, 170, 64), (1, 170, 64), "float16").arrays()
    v[0, 165, 3] = np.nan
    k *= np.linspace(0.2, 3, 170, dtype=np.float16)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "numpy_backend", LaunchBackend(device))
        out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True, kernel="fa1")
    assert_attention_accurate(q, k, v, out, lse, causal=True)


@pytest.mark.host
@needs_compiler
class TestMistakesAreCaught:
    """Mistakes seeded into the kernel; see tests/test_mutants.py."""

    @pytest.mark.parametrize(
        ("old", "new", "way"),
        [
            pytest.param(old, new, way, id=f"{name}-{way}", marks=[pytest.mark.thorough] if way != ways[0] else [])
            for name, old, new, ways in MISTAKES
            for way in ways
        ],
    )
    def test_a_mistake(self, tmp_path: Path, old: str, new: str, way: str) -> None:
        cuda_src = seed_mistake(tmp_path, "kernels/fwd_fa1.cuh", old, new)
        with pytest.raises((HostCudaError, AssertionError)) as error:
            check_on(way, cuda_src)
        assert not isinstance(error.value, CompileError)

    @pytest.mark.parametrize("way", WAYS)
    def test_the_kernel_itself_has_none(self, way: str) -> None:
        check_on(way, CUDA_SRC)


@pytest.mark.host
@needs_compiler
class TestHistory:
    """The sweep that measures the older ways beside FlashAttention-2."""

    @pytest.fixture
    def results(self, monkeypatch: pytest.MonkeyPatch) -> records.Results:
        """What the sweep finds on the emulated GPU, for two short lengths."""
        monkeypatch.setattr(_backends, "numpy_backend", host_backend())
        short = [cells.Cell(64, False, seqlen, batch=1, heads=1, dtype="float16") for seqlen in (32, 256)]
        monkeypatch.setattr(sweeps, "history_cells", lambda dtype: short)
        monkeypatch.setattr(sweeps, "measure_in_turn", partial(measure_in_turn, rounds=1, max_repeats=1))
        choice = sweeps.Choice(("forward", "backward"), ["auto"], [], "float16")
        outcomes = [step.run() for step in sweeps.plan(Cpu(), "history", choice)]
        assert not any(outcome.failures for outcome in outcomes)
        found = [record for outcome in outcomes for record in outcome.records]
        head = {"device": "Emulated", "cuda": None, "date": "2026-11-21", "sources_digest": "ab"}
        return records.merge({}, head, {"history": found})

    def test_a_record_has_time_and_memory(self, results: records.Results) -> None:
        ours = {(record["op"], record["kernel"], record["seqlen"]): record for record in results["history"]}
        assert {(op, kernel) for op, kernel, _ in ours} == {
            (op, kernel) for op in cells.OPS for kernel in cells.HISTORY[op]
        }
        assert all(record["ms"] > 0 and record["tflops"] > 0 for record in ours.values())
        longest = {kernel: ours["forward", kernel, 256]["peak_bytes"] for kernel in cells.HISTORY["forward"]}
        scores = 256 * 256 * 4
        assert longest["naive"] >= scores
        assert longest["wmma"] < scores

    def test_the_table(self, results: records.Results) -> None:
        table = tables.history(results)
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        assert [(row["op"], row["S"]) for row in rows] == [(op, str(s)) for op in cells.OPS for s in (32, 256)]
        assert all(row["naive, ms"] and row["wmma, memory"] for row in rows)
        assert [bool(row["fa1, ms"]) for row in rows] == [True, True, False, False]

    def test_the_plot(self, results: records.Results, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        (drawn,) = plots.draw(results, tmp_path / "emulated")
        assert drawn.name == "emulated-history-float16.png"
        assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_lengths_of_the_history() -> None:
    swept = cells.history_cells("bfloat16")
    assert [cell.seqlen for cell in swept] == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert {cell.batch * cell.seqlen for cell in swept} == {16384}


def test_the_traffic_that_the_document_tells() -> None:
    head_dim, block = 64, 128
    for row in table(ALGORITHM, "N", "MiB in v1", "MiB in v2", "at best"):
        n = int(row["N"])
        matrix = n * head_dim
        v1 = 2 * matrix * 2 + n // block * (matrix * 2 + 2 * matrix * 4) + matrix * 2
        v2 = 2 * matrix * 2 + n // block * 2 * matrix * 2
        printed = [float(row[name]) * 2**20 for name in ("MiB in v1", "MiB in v2", "at best")]
        assert printed == [v1, v2, 4 * matrix * 2]


def kernels() -> Iterator[Any]:
    """By default on the chips of two generations, and of the second not every number: "auto" never takes fa1."""
    for arch, chip in cubin.CHIPS.items():
        for number in NUMBERS:
            for dims in HEAD_DIMS:
                problem = Problem("float16", 1, 1, 1, 64, 64, *dims, 1.0)
                if _fa1.why_not(problem, number, chip) is None:
                    kernel, _ = _fa1.forward(problem, number, chip)
                    usual = dims in ((64, 64), (256, 256))
                    usual &= arch == 70 or (arch == 80 and number in ("bfloat16", "float32"))
                    marks = [] if usual else [pytest.mark.thorough]
                    yield pytest.param(kernel, arch, id=f"{kernel.symbol}-sm_{arch}", marks=marks)


@pytest.mark.compile
@pytest.mark.parametrize(("kernel", "arch"), list(kernels()))
def test_fa1_compiles_without_spills_and_fits(kernel: Any, arch: int) -> None:
    pytest.importorskip("cupy")
    if arch not in cubin.supported_archs():
        pytest.skip(f"this NVRTC knows no sm_{arch}")
    code, log = cubin.compile_for(kernel.source, f"sm_{arch}")
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log), log
    assert kernel.shared_bytes <= cubin.CHIPS[arch].shared_memory
    if arch > 70:  # the disassembler knows no sm_70 any more
        assert cubin.opcodes(cubin.disassembled(code))["HMMA"] > 0
