"""Tests of the tests: mistakes seeded into the kernels, and the ways of running that show each of them.

A mutant is a copy of cuda_src with one piece of text replaced. It goes the way of every call: checks,
parameters, grid, tiles; only the compiler and the device are tests/hostcuda.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _wmma
from cuflash._launch import LaunchBackend
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from tests.hostcuda import CompileError, HostCudaError, HostDevice
from tests.hostcuda.build import can_instrument
from tests.hostcuda.sources import CUDA_SRC

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host ring needs g++"),
]

WAYS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"schedule": "reverse"},
    "greedy": {"schedule": "greedy"},
    "random": {"schedule": "random", "seed": 1},
    "pairs": {"fragment_layout": "pairs"},
    "lazy": {"cp_async": "lazy"},
    "asan": {"flavour": "asan"},
    "tsan": {"flavour": "tsan"},
}


# Of the kernels for 16-bit numbers and 64 columns. Fixed here: the fastest ones may change, and with them
# what a problem brings to light. The last number of the gradients' tiles is that of the stages.
TILES = {"FORWARD_TILES": (64, 64, 4), "DKDV_TILES": (64, 64, 4, 1, 2), "DQ_TILES": (64, 64, 4, 2)}
TILES_OF_ONE_STAGE = TILES | {"DKDV_TILES": (64, 64, 2, 2, 1), "DQ_TILES": (64, 64, 4, 1)}


@dataclass(frozen=True)
class Problem:
    """Inputs that bring a mistake to light: two heads that share one key head."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int = 64
    head_dim_v: int = 64
    causal: bool = False
    window_size: tuple[int, int] | None = None
    one_stage: bool = False
    growth: float = 1.0  # of the keys from the first to the last, so that the largest score comes late
    poisoned: tuple[str, int] | None = None  # the array, and the row, that hold one NaN

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window_size": self.window_size}

    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """Return dout, q, k and v."""
        rng = np.random.default_rng(0)
        dout = rng.standard_normal((2, self.seqlen_q, self.head_dim_v))
        q = rng.standard_normal((2, self.seqlen_q, self.head_dim))
        k = rng.standard_normal((1, self.seqlen_k, self.head_dim))
        v = rng.standard_normal((1, self.seqlen_k, self.head_dim_v))
        k *= np.linspace(1, self.growth, self.seqlen_k)[:, None]
        if self.poisoned:
            name, row = self.poisoned
            {"dout": dout, "q": q, "k": k, "v": v}[name][0, row, 3] = np.nan
        return tuple(x.astype(np.float16) for x in (dout, q, k, v))


PLAIN = Problem(70, 200)
CAUSAL = Problem(100, 150, causal=True)
SQUARE = Problem(129, 129, causal=True)  # the last tiles hold one row and one column
EMPTY_ROWS = Problem(130, 70, causal=True)  # the first 60 queries see nothing
GROWING = Problem(30, 200, growth=8.0)
WINDOW = Problem(150, 150, window_size=(10, 20))
UNSEEN = Problem(70, 200, window_size=(10, 0))  # nobody sees the first 64 keys
NARROW = Problem(40, 100, head_dim=40, head_dim_v=24)
ONE_STAGE = Problem(140, 140, one_stage=True)
# Query 51 is the first that sees key 181, and query 10 sees no key of the second tile.
NAN_IN_V = Problem(70, 200, causal=True, poisoned=("v", 181))
NAN_IN_K = Problem(70, 200, causal=True, poisoned=("k", 181))
NAN_IN_Q = Problem(100, 150, causal=True, poisoned=("q", 10))
NAN_IN_DOUT = Problem(100, 150, causal=True, poisoned=("dout", 10))


@dataclass(frozen=True)
class Mutant:
    name: str
    direction: Literal["forward", "backward"]
    file: str
    old: str
    new: str
    problem: Problem
    ways: tuple[str, ...]  # each of them alone shows the mistake

    def __str__(self) -> str:
        return f"{self.direction}: {self.name}"

    def apply(self, cuda_src: Path) -> None:
        path = cuda_src / "cuflash" / self.file
        text = path.read_text()
        count = text.count(self.old)
        assert count == 1, f"{self.old!r} is {count} times in {self.file}: bring this mutant up to date"
        path.write_text(text.replace(self.old, self.new))


FORWARD = "kernels/fwd_wmma.cuh"
DKDV = "kernels/bwd_wmma_dkdv.cuh"
DQ = "kernels/bwd_wmma_dq.cuh"

MUTANTS = [
    # Missing barriers and weak waits
    Mutant(
        "no barrier before K is read and V overwritten",
        "forward",
        FORWARD,
        "__syncthreads();  // K has arrived",
        "//",
        PLAIN,
        ("greedy", "tsan"),
    ),
    Mutant(
        "no barrier before V is read and K overwritten",
        "forward",
        FORWARD,
        "__syncthreads();  // V has arrived",
        "//",
        PLAIN,
        ("greedy", "tsan"),
    ),
    Mutant(
        "no wait for K",
        "forward",
        FORWARD,
        "ptx::cp_async_wait<0>();\n        __syncthreads();  // K has arrived",
        "__syncthreads();  //",
        PLAIN,
        ("lazy",),
    ),
    Mutant(
        "a wait for V that allows one group to be pending",
        "forward",
        FORWARD,
        "ptx::cp_async_wait<0>();\n        __syncthreads();  // V has arrived",
        "ptx::cp_async_wait<1>();\n      __syncthreads();  //",
        PLAIN,
        ("lazy",),
    ),
    Mutant(
        "no warp barrier between writing and reading a row's scratch",
        "forward",
        "tile/fragment_map.cuh",
        "__syncwarp();\n    const int lane",
        "const int lane",
        PLAIN,
        ("forward", "tsan"),
    ),
    Mutant(
        "no barrier before a stage is read",
        "backward",
        DKDV,
        "__syncthreads();  // this stage has arrived",
        "//",
        CAUSAL,
        ("greedy", "tsan"),
    ),
    Mutant(
        "a wait for a stage that allows one group to be pending",
        "backward",
        DKDV,
        "ptx::cp_async_wait<0>();\n        __syncthreads();  // this stage has arrived",
        "ptx::cp_async_wait<1>();\n      __syncthreads();  //",
        CAUSAL,
        ("lazy",),
    ),
    Mutant(
        "no barrier before the only stage is overwritten",
        "backward",
        DKDV,
        "__syncthreads();  // the only stage is no longer read",
        "//",
        ONE_STAGE,
        ("greedy", "tsan"),
    ),
    Mutant(
        "no barrier before the results overwrite K and V",
        "backward",
        DKDV,
        "if (!__syncthreads_or(!careful && (acc_dk.has_non_finite() || acc_dv.has_non_finite()))) break;",
        "break;",
        UNSEEN,
        ("tsan",),
    ),
    Mutant(
        "no warp barrier before dS is read",
        "backward",
        DQ,
        "__syncwarp();  // dS is visible to its warp",
        "//",
        PLAIN,
        ("tsan",),  # the emulation reads fragments when all lanes of a warp are there
    ),
    # Out of bounds
    Mutant(
        "rows past the end of a matrix are loaded",
        "forward",
        "tile/matrix.cuh",
        "col < source.cols ? source.rows - first_row : 0",
        "col < source.cols ? kRows : 0",
        PLAIN,
        ("asan",),
    ),
    Mutant(
        "columns past the end of a matrix are loaded",
        "forward",
        "tile/matrix.cuh",
        "col < source.cols ? source.rows - first_row : 0",
        "source.rows - first_row",
        NARROW,
        ("forward", "asan"),
    ),
    Mutant(
        "one row past the end of the output is stored",
        "backward",
        "tile/matrix.cuh",
        "smaller(kRows, target.rows - first_row)",
        "smaller(kRows, target.rows - first_row + 1)",
        PLAIN,
        ("forward", "asan"),
    ),
    Mutant(
        "the statistics of rows past the end are read",
        "backward",
        "attention/recompute.cuh",
        "if (row >= seqlen_q) return infinity();",
        "",
        CAUSAL,
        ("asan",),
    ),
    # Fragment layouts
    Mutant(
        "every layout is taken for a paired one",
        "forward",
        "tile/fragment_map.cuh",
        "paired = __all_sync(kFullMask, neighbours);",
        "paired = true;",
        PLAIN,
        ("forward",),
    ),
    Mutant(
        "the second of two paired elements is lost",
        "backward",
        "common/numbers.cuh",
        "__floats2half2_rn(x, y)",
        "__floats2half2_rn(x, x)",
        PLAIN,
        ("pairs",),
    ),
    # Wrong masks and ranges
    Mutant(
        "a query sees one key too many",
        "forward",
        "attention/band.cuh",
        "j < i + end &&",
        "j <= i + end &&",
        CAUSAL,
        ("forward", "pairs"),
    ),
    Mutant(
        "keys past the end are visible",
        "forward",
        "attention/band.cuh",
        " && j < seqlen_k;",
        ";",
        PLAIN,
        ("forward",),
    ),
    Mutant(
        "tiles on the diagonal are not masked",
        "forward",
        "attention/band.cuh",
        "keys.end <= queries.begin + end",
        "keys.end <= queries.end + end",
        SQUARE,
        ("forward",),
    ),
    Mutant(
        "the last tile of keys is skipped",
        "forward",
        "attention/band.cuh",
        "min(seqlen_k, last + end)",
        "min(seqlen_k, last + end - 1)",
        SQUARE,
        ("forward",),
    ),
    Mutant(
        "some queries are skipped",
        "backward",
        "attention/band.cuh",
        "min(seqlen_q, last - begin + 1)",
        "min(seqlen_q, last - begin - 10)",
        WINDOW,
        ("forward",),
    ),
    # Wrong arithmetic
    Mutant(
        "the sum of a row is not rescaled",
        "forward",
        FORWARD,
        "row_sum.tile[m][0].x[i] *= row_factor;",
        "",
        GROWING,
        ("forward", "pairs"),
    ),
    Mutant(
        "rows without keys subtract infinities",
        "forward",
        "attention/softmax.cuh",
        "return base == -infinity() ? 0.0f : base;",
        "return base;",
        EMPTY_ROWS,
        ("forward",),
    ),
    Mutant(
        "lse in base 2",
        "forward",
        "attention/softmax.cuh",
        "base + kLn2 * log2f(sum)",
        "base + log2f(sum)",
        PLAIN,
        ("forward",),
    ),
    Mutant(
        "query heads use the wrong key head's dS",
        "backward",
        DKDV,
        "return head_kv * problem.group_size() + step / num_m_blocks;",
        "return head_kv * problem.group_size();",
        CAUSAL,
        ("forward",),
    ),
    Mutant(
        "the stage that is being loaded is used",
        "backward",
        DKDV,
        "++step) {\n        const Stage stage(stages + step % kNumStages",
        "++step) {\n        const Stage stage(stages + (step + 1) % kNumStages",
        PLAIN,
        ("forward", "lazy"),
    ),
    Mutant(
        "delta is left out",
        "backward",
        "attention/recompute.cuh",
        "return weight * (dweight - delta);",
        "return weight * dweight;",
        PLAIN,
        ("forward",),
    ),
    Mutant(
        "the scale of dq is left out",
        "backward",
        DQ,
        "x *= problem.softmax_scale;",
        "",
        PLAIN,
        ("forward",),
    ),
    # NaN and infinity that spread to where they are not seen, or are lost where they are
    Mutant(
        "nothing tells that there is a NaN",
        "forward",
        "tile/warp_tile.cuh",
        "return zero != 0.0f;",
        "return false;",
        NAN_IN_V,
        ("forward", "pairs"),
    ),
    Mutant(
        "a NaN reaches rows that do not see it",
        "forward",
        "tile/non_finite.cuh",
        "!is_finite(factor) && visible(row, k)",
        "!is_finite(factor)",
        NAN_IN_V,
        ("forward",),
    ),
    Mutant(
        "no barrier before a NaN is cleared",
        "forward",
        "tile/non_finite.cuh",
        "clear_non_finite(T* tile) {\n  __syncthreads();",
        "clear_non_finite(T* tile) {",
        NAN_IN_V,
        ("greedy", "tsan"),
    ),
    Mutant(
        "no barrier after a NaN is cleared",
        "forward",
        "tile/non_finite.cuh",
        "from_float<T>(0.0f);\n  }\n  __syncthreads();",
        "from_float<T>(0.0f);\n  }",
        NAN_IN_V,
        ("greedy", "tsan"),
    ),
    Mutant(
        "a NaN that only dK meets is overlooked",
        "backward",
        DKDV,
        "acc_dk.has_non_finite() || ",
        "",
        NAN_IN_Q,
        ("forward",),
    ),
    Mutant(
        "a NaN that only dV meets is overlooked",
        "backward",
        DKDV,
        " || acc_dv.has_non_finite()",
        "",
        NAN_IN_DOUT,
        ("forward",),
    ),
    Mutant(
        "a NaN in Q is not cleared",
        "backward",
        DKDV,
        "clear_non_finite<kBlockM, kHeadDim, kNumThreads>(stage.q);",
        "",
        NAN_IN_Q,
        ("forward",),
    ),
    Mutant(
        "the second round adds to the first",
        "backward",
        DQ,
        "acc_dq.clear();",
        "if (!careful) acc_dq.clear();",
        NAN_IN_K,
        ("forward",),
    ),
    Mutant(
        "hidden gradients of weights are NaN",
        "backward",
        DQ,
        "if (masked) acc_dp.for_each(hide);",
        "",
        NAN_IN_V,
        ("forward",),
    ),
]

CASES = [(mutant, way) for mutant in MUTANTS for way in mutant.ways]


@contextmanager
def numpy_arrays_on(device: HostDevice, tiles: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Calls on NumPy arrays take the kernels' path, with these tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "numpy_backend", LaunchBackend(device))
        for table, tile in tiles.items():
            patch.setitem(getattr(_wmma, table), (2, 64), [tile])
        yield


def run(direction: str, problem: Problem, way: str, cuda_src: Path) -> None:
    """Compute the problem and check the result against the reference."""
    device = HostDevice(**WAYS[way], isolated=True, timeout=60, cuda_src=cuda_src)
    if not can_instrument(device.flavour):
        pytest.skip(f"the compiler cannot link {device.flavour}")
    tiles = TILES_OF_ONE_STAGE if problem.one_stage else TILES
    dout, q, k, v = problem.arrays()
    if direction == "forward":
        with numpy_arrays_on(device, tiles):
            out, lse = cuflash.attention(q, k, v, return_lse=True, **problem.options)
        assert_attention_accurate(q, k, v, out, lse, **problem.options)
    else:
        out, lse = cuflash.attention(q, k, v, return_lse=True, **problem.options)
        with numpy_arrays_on(device, tiles):
            gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **problem.options)
        assert_gradients_accurate(dout, q, k, v, *gradients, **problem.options)


@pytest.mark.parametrize(("mutant", "way"), CASES, ids=lambda value: str(value).replace(" ", "_"))
def test_mutants_are_caught(mutant: Mutant, way: str, tmp_path: Path) -> None:
    cuda_src = tmp_path / "cuda_src"
    shutil.copytree(CUDA_SRC, cuda_src)
    mutant.apply(cuda_src)
    with pytest.raises((HostCudaError, AssertionError)) as error:
        run(mutant.direction, mutant.problem, way, cuda_src)
    assert not isinstance(error.value, CompileError), "a mutant that does not compile proves nothing"


@pytest.mark.parametrize(
    ("direction", "problem", "way"),
    sorted({(mutant.direction, mutant.problem, way) for mutant, way in CASES}, key=str),
    ids=lambda value: str(value).replace(" ", ""),
)
def test_the_kernels_themselves_are_not(direction: str, problem: Problem, way: str) -> None:
    run(direction, problem, way, CUDA_SRC)


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 12
    assert {mutant.direction for mutant in MUTANTS} == {"forward", "backward"}
    assert {way for _, way in CASES} >= {"forward", "greedy", "pairs", "lazy", "asan", "tsan"}
