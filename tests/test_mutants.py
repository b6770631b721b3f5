"""Tests of the tests: mistakes seeded into the kernels, and the ways of running that show each of them.

A mutant is a copy of cuda_src with one piece of text replaced. It goes the way of every call: checks,
parameters, grid, tiles; only the compiler and the device are tests/hostcuda.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _dbias, _parts, _sm80_tiles, _wmma
from cuflash._launch import LaunchBackend
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem, PackedProblem, PairArray
from tests.conftest import host_ring
from tests.hostcuda import CompileError, HostCudaError, HostDevice
from tests.hostcuda.build import can_instrument
from tests.hostcuda.device import HOST_CHIP
from tests.hostcuda.sources import CUDA_SRC
from tests.mistakes import seed_mistake

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
TILES = {
    "FORWARD_TILES": (64, 64, 4),
    "DKDV_TILES": (64, 64, 4, 1, 2),
    "DQ_TILES": (64, 64, 4, 1, 2),
}
# Of the sm80 family, which has tables of its own.
SM80_TILES = {
    "FORWARD_TILES": _sm80_tiles.Tile(64, 64, 4, 2),
    "DKDV_TILES": _sm80_tiles.DkDvTile(64, 64, 4, 1, 1, 2),
    "DQ_TILES": _sm80_tiles.DqTile(64, 64, 4, 2),
}
SM80_TILES_OF_ONE_STAGE = {
    "FORWARD_TILES": _sm80_tiles.Tile(64, 64, 4, 1),
    "DKDV_TILES": _sm80_tiles.DkDvTile(64, 64, 8, 2, 1, 1),
    "DQ_TILES": _sm80_tiles.DqTile(64, 64, 4, 1),
}
TILES_OF_ONE_STAGE = TILES | {"DKDV_TILES": (64, 64, 2, 2, 1), "DQ_TILES": (64, 64, 2, 2, 1)}


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
    deterministic: bool = False
    growth: float = 1.0  # of the keys from the first to the last, so that the largest score comes late
    poisoned: tuple[str, int] | None = None  # the array, and the row, that hold one NaN
    in_parts: bool = False  # keys are shared out, as on a chip with many multiprocessors
    masked: bool = False  # by an array
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        mask = np.random.default_rng(1).random((self.seqlen_q, self.seqlen_k)) < 0.5 if self.masked else None
        return {"causal": self.causal, "window_size": self.window_size, "mask": mask, "softcap": self.softcap}

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


@dataclass(frozen=True, repr=False)
class Overlong(PackedProblem):
    """Packed sequences of which the last ends, by its offset, behind the arrays."""

    def arrays(self, xp: Any = np) -> tuple[Any, Any, Any, Any, Any]:
        q, k, v, cu_seqlens_q, cu_seqlens_k = super().arrays(xp)
        cu_seqlens_q[-1] += 3
        return q, k, v, cu_seqlens_q, cu_seqlens_k


PLAIN = Problem(70, 200)
CAUSAL = Problem(100, 150, causal=True)
SQUARE = Problem(129, 129, causal=True)  # the last tiles hold one row and one column
EMPTY_ROWS = Problem(130, 70, causal=True)  # the first 60 queries see nothing
GROWING = Problem(30, 200, growth=8.0)
WINDOW = Problem(150, 150, window_size=(10, 20))
UNSEEN = Problem(70, 200, window_size=(10, 0))  # nobody sees the first 64 keys
NARROW = Problem(40, 100, head_dim=40, head_dim_v=24)
ONE_STAGE = Problem(140, 140, one_stage=True)
APART = Problem(100, 150, causal=True, deterministic=True)
APART_ONE_STAGE = replace(APART, one_stage=True)
IN_PARTS = replace(GROWING, in_parts=True)
# Query 51 is the first that sees key 181, and query 10 sees no key of the second tile.
NAN_IN_V = Problem(70, 200, causal=True, poisoned=("v", 181))
NAN_IN_K = Problem(70, 200, causal=True, poisoned=("k", 181))
NAN_IN_Q = Problem(100, 150, causal=True, poisoned=("q", 10))
NAN_IN_DOUT = Problem(100, 150, causal=True, poisoned=("dout", 10))
# Under a random mask, half of the queries see key 181, which lies in the tile before the last.
MASKED_NAN_IN_V = Problem(70, 200, poisoned=("v", 181), masked=True)

VARIANT = AttentionProblem(q=(2, 70, 64), k=(1, 200, 64), v=(1, 200, 64), dtype="float16")
FLOAT32 = replace(VARIANT, dtype="float32")
SHORT_FLOAT32 = replace(FLOAT32, q=(2, 70, 8), k=(1, 200, 8), v=(1, 200, 8))
SOFTCAP = replace(VARIANT, softcap=0.5)
ALIBI = replace(VARIANT, alibi="heads")
BIAS = replace(VARIANT, bias=PairArray((70, 200)))
SHARED_BIAS = replace(BIAS, q=(2, 2, 70, 64), bias=PairArray((70, 200)))  # by 2 batch entries and 2 heads
BIAS_OF_HEADS = replace(BIAS, q=(2, 2, 70, 64), bias=PairArray((2, 70, 200)), causal=True)
ROW_BIAS = replace(VARIANT, bias=PairArray((1, 200)))
SINKS = replace(VARIANT, sinks="float32")
DROPOUT = replace(VARIANT, dropout_p=0.3)
BLOCKS = replace(VARIANT, q=(2, 300, 64), k=(1, 300, 64), v=(1, 300, 64), block_mask=True)
MASKED_BLOCKS = replace(BLOCKS, mask=PairArray((300, 300), hidden=0.3))
SQUARED = replace(VARIANT, score_mod="square")
DLSE = replace(VARIANT, with_dlse=True)
PACKED = PackedProblem((30, 70, 1), (90, 5, 140), heads=(2, 1), head_dims=(64, 64), tails=(7, 9), dtype="float16")
MANY = replace(PACKED, lengths_q=(3, 5) * 16, lengths_k=(4, 2) * 16)  # so many that they are taken one after the other
UNUSED = replace(PACKED, seqused_k=(65, 0, 139))
OVERLONG = Overlong((30, 70, 1), (90, 5, 140), heads=(2, 1), head_dims=(64, 64), dtype="float16")


@dataclass(frozen=True)
class Mutant:
    name: str
    direction: Literal["forward", "backward"]
    file: str
    old: str
    new: str
    problem: Problem | AttentionProblem | PackedProblem
    ways: tuple[str, ...]  # each of them alone shows the mistake, the first in the least time
    family: str = "wmma"
    slow: bool = False  # several kernels with a sanitizer, and the likes of it are shown by others

    def __str__(self) -> str:
        return f"{self.family} {self.direction}: {self.name}"


FORWARD = "kernels/fwd_wmma.cuh"
DKDV = "kernels/bwd_wmma_dkdv.cuh"
DQ = "kernels/bwd_wmma_dq.cuh"
DBIAS = "kernels/bwd_wmma_dbias.cuh"
BIAS_WALK = "attention/bias_walk.cuh"
BIAS_TILES = "attention/bias_tiles.cuh"
SM80_FORWARD = "kernels/fwd_sm80.cuh"
SM80_DKDV = "kernels/bwd_sm80_dkdv.cuh"
SM80_DQ = "kernels/bwd_sm80_dq.cuh"
SM80_DBIAS = "kernels/bwd_sm80_dbias.cuh"

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
        ("tsan",),  # what is not there yet is NaN: the second, careful round has more barriers
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
        slow=True,
    ),
    Mutant(
        "no warp barrier before dS is read",
        "backward",
        DQ,
        "__syncwarp();  // dS is visible to the warp that wrote it",
        "//",
        PLAIN,
        ("tsan",),  # the emulation reads fragments when all lanes of a warp are there
        slow=True,
    ),
    Mutant(
        "no barrier before another warp's dS is read",
        "backward",
        DQ,
        "} else {\n          __syncthreads();\n        }",
        "}",
        ONE_STAGE,
        ("tsan",),  # what is not there yet is NaN: the second, careful round has more barriers
        slow=True,
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
        slow=True,
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
        "kLn2 * log2f(sum))",
        "log2f(sum))",
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
        "following = skip_hidden(step + 1);\n        const Stage stage(stages + turn % kNumStages",
        "following = skip_hidden(step + 1);\n        const Stage stage(stages + (turn + 1) % kNumStages",
        PLAIN,
        ("forward", "lazy"),
    ),
    Mutant(
        "delta is left out",
        "backward",
        "attention/recompute.cuh",
        "return {weight, weight * (dweight - delta) * score.slope};",
        "return {weight, weight * dweight * score.slope};",
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
        "gradients of hidden scores are kept",
        "backward",
        DQ,
        "if (!visible(warp_row + 16 * m + map.row(i), warp_key + 16 * n + map.col(i))) x = 0.0f;",
        "",
        NAN_IN_V,
        ("forward",),
    ),
    # Options
    Mutant(
        "weights are dropped by the draws of other keys",
        "forward",
        "attention/dropout.cuh",
        "first_key / 8 + lane % 4",
        "first_key / 16 + lane % 4",
        DROPOUT,
        ("forward", "pairs"),
    ),
    Mutant(
        "half of the seed is ignored",
        "forward",
        "attention/dropout.cuh",
        "static_cast<unsigned>(seed >> 32)",
        "0u",
        DROPOUT,
        ("forward",),
    ),
    Mutant(
        "heads drop the same weights",
        "forward",
        "attention/dropout.cuh",
        "make_uint4(column, row, head, batch)",
        "make_uint4(column, row, 0, batch)",
        DROPOUT,
        ("forward",),
    ),
    Mutant(
        "the weights that survive dropout are not enlarged",
        "forward",
        FORWARD,
        "float factor = options.survivor_factor();",
        "float factor = 1.0f;",
        DROPOUT,
        ("forward",),
    ),
    Mutant(
        "dropout's bits are not transposed with the scores",
        "backward",
        DKDV,
        "Options, true> survives",
        "Options> survives",
        DROPOUT,
        ("forward", "pairs"),
    ),
    Mutant(
        "dropped weights keep their gradients",
        "backward",
        "attention/recompute.cuh",
        "(factor * dweight - delta)",
        "(dweight - delta)",
        DROPOUT,
        ("forward",),
    ),
    Mutant(
        "the slope of the softcap is left out",
        "backward",
        "attention/softcap.cuh",
        "fmaf(-tanh, tanh, 1.0f)",
        "1.0f",
        SOFTCAP,
        ("forward",),
    ),
    Mutant(
        "scores near the cap go the way of small ones",
        "forward",
        "attention/softcap.cuh",
        "limits[static_cast<int>(size)]",
        "limits[1]",
        replace(VARIANT, softcap=8.0),
        ("forward",),
    ),
    Mutant(
        "the diagonal of ALiBi ends at the first key",
        "forward",
        "attention/alibi.cuh",
        "diagonal = sequence.seqlen_k - sequence.seqlen_q;",
        "diagonal = 0;",
        ALIBI,
        ("forward",),
    ),
    Mutant(
        "every tile of a bias is the first one",
        "forward",
        "attention/pairs.cuh",
        "data + first_key * strides.col",
        "data",
        BIAS,
        ("forward",),
    ),
    Mutant(
        "nobody waits for the next keys and their bias",
        "forward",
        FORWARD,
        "load_keys(following);\n        ptx::cp_async_commit();",
        "ptx::cp_async_commit();\n        load_keys(following);",
        BIAS,
        ("lazy",),
    ),
    Mutant(
        "the next keys' mask comes while this one is read",
        "forward",
        FORWARD,
        "if (careful) {",
        "load_keys(following);\n        if (careful) {",
        MASKED_NAN_IN_V,
        ("forward",),
    ),
    Mutant(
        "the bias of a batch entry is taken for all of it",
        "backward",
        BIAS_WALK,
        "end.batch = gradient.batch == 1 ? pairs.batch : first.batch + 1;",
        "end.batch = first.batch + 1;",
        SHARED_BIAS,
        ("forward",),
    ),
    Mutant(
        "the gradient of a shared row is that of the first tile",
        "backward",
        BIAS_WALK,
        "end.m_block = gradient.m_block == 1 ? pairs.m_block : first.m_block + 1;",
        "end.m_block = first.m_block + 1;",
        ROW_BIAS,
        ("forward",),
    ),
    Mutant(
        "no barrier before the pairs of a tile are overwritten",
        "backward",
        DBIAS,
        "__syncthreads();  // the only stage is no longer read",
        "//",
        replace(SHARED_BIAS, dtype="float32"),
        ("greedy",),
    ),
    Mutant(
        "sinks take no weight",
        "forward",
        FORWARD,
        "if constexpr (Options::kHasSinks) factor *= softmax[m].join(options.sink(), sum);",
        "",
        SINKS,
        ("forward",),
    ),
    Mutant(
        "the gradient of sinks has the wrong sign",
        "backward",
        "kernels/bwd_sinks.cuh",
        "sum -= weight * rows.delta_of(row);",
        "sum += weight * rows.delta_of(row);",
        SINKS,
        ("forward",),
    ),
    Mutant(
        "bits of a block mask are counted by rows",
        "forward",
        "attention/block_mask.cuh",
        "some[word] >> col % 32 & 1",
        "some[word] >> row % 32 & 1",
        BLOCKS,
        ("forward",),
    ),
    Mutant(
        "the derivative of a product forgets a factor",
        "backward",
        "attention/dual.cuh",
        "x.slope * y.value + x.value * y.slope",
        "x.slope * y.value",
        SQUARED,
        ("forward", "pairs"),
    ),
    Mutant(
        "the gradient of lse has the wrong sign",
        "backward",
        "kernels/bwd_delta.cuh",
        "? sums[i] : sums[i] - *dlse.at",
        "? sums[i] : sums[i] + *dlse.at",
        DLSE,
        ("forward",),
    ),
    Mutant(
        "packed keys begin where the queries do",
        "forward",
        "attention/packed.cuh",
        "return {s, first_query, first_key, seqlen_q,",
        "return {s, first_query, first_query, seqlen_q,",
        PACKED,
        ("forward",),
    ),
    Mutant(
        "packed rows of no sequence are not cleared",
        "forward",
        "attention/packed.cuh",
        "problem.seqlen_q - first_query,\n              0,",
        "0,\n              0,",
        PACKED,
        ("forward",),
    ),
    Mutant(
        "the first job of a packed sequence goes to the one before",
        "forward",
        "attention/packed.cuh",
        "(cu_seqlens, total, s) <= job;",
        "(cu_seqlens, total, s) < job;",
        MANY,
        ("forward", "random"),
    ),
    Mutant(
        "of tiles that take as long one of the next sequence is computed by the sequence before",
        "forward",
        "attention/packed.cuh",
        "__ballot_sync(kFullMask, end <= among)",
        "__ballot_sync(kFullMask, end < among)",
        PACKED,
        ("forward",),
    ),
    Mutant(
        "tiles of packed sequences that take longer are counted once more",
        "forward",
        "attention/packed.cuh",
        "(time + step - 1)) > number) time += step;",
        "(time + step - 1)) >= number) time += step;",
        PACKED,
        ("forward",),
    ),
    Mutant(
        "packed keys that are not used are seen",
        "backward",
        "attention/packed.cuh",
        "clamp(seqused_k[s], 0, num_keys)",
        "num_keys",
        UNUSED,
        ("forward",),
    ),
    Mutant(
        "packed offsets lead out of the arrays",
        "forward",
        "attention/packed.cuh",
        "return clamp(cu_seqlens[s], 0, total);",
        "return cu_seqlens[s];",
        OVERLONG,
        ("forward",),
    ),
]


def sm80(
    name: str,
    direction: Literal["forward", "backward"],
    file: str,
    old: str,
    new: str,
    problem: Problem | AttentionProblem | PackedProblem,
    *ways: str,
) -> Mutant:
    return Mutant(name, direction, file, old, new, problem, ways, "sm80")


ARRIVED = "__syncthreads();  // this stage has arrived"
MUTANTS += [
    # Missing barriers and weak waits
    sm80("no barrier before a stage is read", "forward", SM80_FORWARD, ARRIVED, "//", PLAIN, "greedy", "tsan"),
    sm80(
        "a wait for a stage that allows one group more",
        "forward",
        SM80_FORWARD,
        f"cp_async_wait<0>();\n      {ARRIVED}",
        f"cp_async_wait<kStages - 1>();\n      {ARRIVED}",
        PLAIN,
        "lazy",
    ),
    sm80(
        "no barrier before V is read and K overwritten",
        "forward",
        SM80_FORWARD,
        "__syncthreads();  // V has arrived",
        "//",
        ONE_STAGE,
        "greedy",
        "tsan",
    ),
    sm80("no barrier before a stage is read", "backward", SM80_DKDV, ARRIVED, "//", CAUSAL, "greedy", "tsan"),
    sm80(
        "no barrier before dS is read",
        "backward",
        SM80_DKDV,
        "__syncthreads();  // dS is there",
        "//",
        CAUSAL,
        "greedy",
        "tsan",
    ),
    sm80(
        "no barrier before weights of other warps are read",
        "backward",
        SM80_DKDV,
        "__syncthreads();  // P and dS are there",
        "//",
        ONE_STAGE,
        "greedy",
        "tsan",
    ),
    sm80("no barrier before a stage is read", "backward", SM80_DQ, ARRIVED, "//", APART, "greedy", "tsan"),
    sm80(
        "no barrier before the only stage is overwritten",
        "backward",
        SM80_DQ,
        "__syncthreads();  // the only stage is no longer read",
        "//",
        APART_ONE_STAGE,
        "greedy",
        "tsan",
    ),
    sm80(
        "no barrier before the first panel of a tile is read",
        "backward",
        SM80_DBIAS,
        "__syncthreads();  // this panel has arrived",
        "if (panel > 0) __syncthreads();  //",  # without any, tiles are read of which nothing was written down
        BIAS_OF_HEADS,
        "greedy",
    ),
    sm80(
        "a wait for a panel that allows one group more",
        "backward",
        SM80_DBIAS,
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
        BIAS_OF_HEADS,
        "lazy",
    ),
    sm80(
        "no wait for the pairs of the next tile",
        "backward",
        SM80_DBIAS,
        "ptx::cp_async_wait<0>();\n        __syncthreads();  // the pairs have arrived",
        "",
        replace(BIAS_OF_HEADS, q=(2, 2, 128, 64), bias=PairArray((2, 128, 200))),
        "lazy",
    ),
    sm80(
        "no barrier before the sums overwrite the panels",
        "backward",
        SM80_DBIAS,
        "__syncthreads();  // shared memory is no longer read",
        "//",
        replace(ROW_BIAS, q=(70, 64), k=(200, 64), v=(200, 64)),  # the last panel is in the first stage
        "greedy",
        "tsan",
    ),
    sm80(
        "no barrier before the job is looked at",
        "forward",
        SM80_FORWARD,
        "shared.work = Work(arrays, params, options, job, part);\n    __syncthreads();",
        "shared.work = Work(arrays, params, options, job, part);",
        PLAIN,
        "reverse",
        "tsan",
    ),
    # Out of bounds
    sm80(
        "rows past the end of a matrix are loaded",
        "forward",
        "tile/ldmatrix_tile.cuh",
        "first_row + kRows <= source.rows &&",
        "",
        PLAIN,
        "asan",
    ),
    sm80(
        "columns past the end of a matrix are loaded",
        "forward",
        "tile/ldmatrix_tile.cuh",
        "i * kRowStep < num_rows && group < num_cols",
        "i * kRowStep < num_rows",
        NARROW,
        "forward",
        "asan",
    ),
    sm80(
        "a row past the end of the output is stored",
        "forward",
        "tile/row_store.cuh",
        "if (row < out.rows && first_col",
        "if (row <= out.rows && first_col",
        PLAIN,
        "forward",
        "asan",
    ),
    # Wrong places
    sm80(
        "the swizzle is left out where rows are read",
        "forward",
        "tile/ldmatrix_tile.cuh",
        "place ^ kSize * (col % kGroup)",
        "place + kSize * (col % kGroup)",
        PLAIN,
        "forward",
    ),
    sm80(
        "dS is not transposed",
        "backward",
        "tile/mma_product.cuh",
        "ptx::ldmatrix_transposed(x, reader.at(row, 16 * m));",
        "ptx::ldmatrix(x, reader.at(row, 16 * m));",
        CAUSAL,
        "forward",
    ),
    sm80(
        "values of float32 meet the weights of other keys",
        "forward",
        "tile/mma_product.cuh",
        "x[1] = ptx::load_shared(odd.at(row, col));",
        "x[1] = ptx::load_shared(even.at(row, col));",
        FLOAT32,
        "forward",
    ),
    # Wrong masks and ranges
    sm80(
        "tiles that are seen in part are not masked",
        "forward",
        SM80_FORWARD,
        "if (masked) tile.template hide_by_band",
        "if (false) tile.template hide_by_band",
        CAUSAL,
        "forward",
    ),
    sm80(
        "warps pass by tiles of which they see the last key alone",
        "forward",
        SM80_FORWARD,
        "first_key < keys.end &&",
        "first_key + 1 < keys.end &&",
        SQUARE,
        "forward",
    ),
    sm80(
        "a key is seen by one query too many",
        "backward",
        "attention/register_gradient.cuh",
        "row - band.end + 1,",
        "row - band.end,",
        CAUSAL,
        "forward",
    ),
    sm80(
        "a query sees one key too many",
        "backward",
        "attention/register_gradient.cuh",
        "min(row + band.end, band.seqlen_k)",
        "min(row + band.end + 1, band.seqlen_k)",
        APART,
        "forward",
    ),
    sm80(
        "parts of the keys overlap",
        "forward",
        "attention/key_blocks.cuh",
        "end = min(begin + length, end);",
        "end = min(begin + length + 1, end);",
        IN_PARTS,
        "forward",
    ),
    sm80(
        "rows beside NaN are computed again from the keys of other parts too",
        "forward",
        "attention/careful_row.cuh",
        "begin = max(keys.begin, in_band.begin), end = min(keys.end, in_band.end);",
        "begin = in_band.begin, end = in_band.end;",
        replace(NAN_IN_V, in_parts=True),
        "forward",
    ),
    sm80(
        "pairs that a warp passes by keep the dS of an earlier step",
        "backward",
        SM80_DKDV,
        "share(Weights{}, Weights{}, n);",
        ";",
        WINDOW,
        "forward",
    ),
    sm80(
        "warps pass by queries that see the first of their keys alone",
        "backward",
        "attention/band.cuh",
        "max(seen.begin, keys.begin) < min(seen.end, keys.end)",
        "max(seen.begin, keys.begin) + 1 < min(seen.end, keys.end)",
        SQUARE,
        "forward",
    ),
    sm80(
        "the gradient of a bias counts hidden pairs",
        "backward",
        SM80_DBIAS,
        "if (masked) tile.hide_by_band",
        "if (false) tile.hide_by_band",
        BIAS_OF_HEADS,
        "forward",
    ),
    sm80(
        "a tile of the gradient of a bias begins with the sums of the one before",
        "backward",
        SM80_DBIAS,
        "sums[m].clear();\n        }\n      }",
        "}\n      }",
        BIAS_OF_HEADS,
        "forward",
    ),
    sm80(
        "a bias is read behind its end",
        "backward",
        "attention/pairs.cuh",
        "seqlen_q, seqlen_k - first_key)",
        "seqlen_q, seqlen_k)",
        BIAS_OF_HEADS,
        "asan",
    ),
    sm80(
        "a tile of the gradient of a bias that nobody sees is not written",
        "backward",
        BIAS_TILES,
        "tile.visible = !walk.done(step);",
        "tile.visible = !walk.done(step);\n      if (!tile.visible) tile.exists = false;",
        replace(BIAS_OF_HEADS, q=(2, 2, 200, 64), bias=PairArray((2, 200, 200))),
        "forward",
    ),
    sm80(
        "the bias of the tile before is kept",
        "backward",
        SM80_DBIAS,
        "number > 0 && visible && !tile_of_pairs.same",
        "false",
        BIAS_OF_HEADS,
        "forward",
    ),
    sm80(
        "the mask of the batch entry before is kept",
        "backward",
        BIAS_TILES,
        "same_place && options.same_in_batch()",
        "same_place",
        replace(SHARED_BIAS, mask=PairArray((2, 1, 70, 200), hidden=0.3)),
        "forward",
    ),
    sm80(
        "keys of a group's second head are those of another group",
        "backward",
        BIAS_TILES,
        "same_head ? before.head_kv : step.head / group_size",
        "step.head % problem.num_heads_kv",
        replace(SHARED_BIAS, q=(4, 70, 64), k=(2, 200, 64), v=(2, 200, 64)),
        "forward",
    ),
    # Wrong numbers
    sm80(
        "what TF32 leaves of a float is lost",
        "forward",
        "tile/mma_factor.cuh",
        "low[i] = __float_as_uint(value - __uint_as_float(high[i]));",
        "low[i] = 0u;",
        FLOAT32,
        "forward",
    ),
    sm80(
        "the last third of a float is lost",
        "forward",
        "tile/mma_factor.cuh",
        "low[i] = upper_halves(lows);",
        "low[i] = 0u;",
        SHORT_FLOAT32,
        "forward",
    ),
    sm80(
        "products of high parts of keys with middle ones of queries are lost",
        "forward",
        "tile/mma_factor.cuh",
        "middle_and_high[4] = {a.middle[0], a.middle[1]",
        "middle_and_high[4] = {0u, 0u",
        SHORT_FLOAT32,
        "forward",
    ),
    sm80(
        "merged parts are not rescaled when a maximum grows",
        "forward",
        "kernels/merge_parts.cuh",
        "acc[i] = acc[i] * factor + weight * x[i];",
        "acc[i] = acc[i] + weight * x[i];",
        IN_PARTS,
        "forward",
    ),
    sm80(
        "the output is not rescaled when a maximum grows",
        "forward",
        SM80_FORWARD,
        "output[m].x[i] *= factor[row_of_element(i)];",
        ";",
        replace(GROWING, growth=-8.0),
        "forward",
    ),
    sm80(
        "sums are not rescaled when a maximum grows",
        "forward",
        "attention/register_softmax.cuh",
        "sum[r] *= factor[r];",
        "",
        replace(GROWING, growth=-8.0),
        "forward",
    ),
    sm80(
        "what bounds the scores of a softcap is too small",
        "forward",
        "attention/register_softmax.cuh",
        "rest.bound = scores.largest()",
        "rest.bound = -scores.largest()",
        replace(GROWING, softcap=30.0),
        "forward",
    ),
    sm80(
        "rows beside NaN are not computed again",
        "forward",
        SM80_FORWARD,
        "if (hides_pairs && __any_sync(kFullMask, !finite))",
        "if (false)",
        NAN_IN_V,
        "forward",
    ),
    sm80(
        "keys beside NaN are not computed again",
        "backward",
        SM80_DKDV,
        "if (hides_pairs && __syncthreads_or(!finite))",
        "if (false)",
        NAN_IN_DOUT,
        "forward",
    ),
    sm80(
        "sums of dQ beside NaN are not computed again",
        "backward",
        "kernels/bwd_sm80_finish.cuh",
        "if (hides_pairs && __syncthreads_or(!finite))",
        "if (false)",
        NAN_IN_K,
        "forward",
    ),
    sm80(
        "the line of ALiBi rises on both sides of the diagonal",
        "forward",
        "attention/alibi.cuh",
        "(query + diagonal > key ? slope : -slope)",
        "slope",
        ALIBI,
        "forward",
    ),
    sm80(
        "what ALiBi's line leaves to do is not done",
        "forward",
        "attention/register_softmax.cuh",
        "options.penalty(first_query, middle) * pairs.scale",
        "0.0f",
        ALIBI,
        "forward",
    ),
    sm80(
        "the second row of a lane has the line of the first",
        "forward",
        "attention/register_softmax.cuh",
        "- kHalf - 8 * row_of_element(i),",
        "- kHalf,",
        ALIBI,
        "forward",
    ),
    sm80(
        "the second row of a lane sees the keys of the first",
        "forward",
        "attention/register_softmax.cuh",
        "min(end + 2 * r, all)",
        "min(end, all)",
        CAUSAL,
        "forward",
    ),
    sm80(
        "a window begins with the first of two neighbours, or behind both",
        "forward",
        "tile/warpgroup_tile.cuh",
        "(col >> 3) * 2 + min(col & 7, 2)",
        "(col >> 3) * 2 + min(col & 6, 2)",
        CAUSAL,
        "forward",
    ),
    sm80(
        "the factor that a softcap leaves is left out",
        "forward",
        "attention/register_softmax.cuh",
        "rest.scale = pairs.factor();",
        "rest.scale = 1.0f;",
        replace(VARIANT, softcap=30.0),
        "forward",
    ),
    sm80(
        "a word of random bits is not rotated for the second two of its weights",
        "forward",
        "attention/dropout.cuh",
        "i / 4 % 2 ? __funnelshift_l(word, word, 8) : word",
        "word",
        DROPOUT,
        "forward",
    ),
    sm80(
        "weights below the threshold survive",
        "forward",
        "attention/dropout.cuh",
        "return below(i) ^ inverse;",
        "return below(i);",
        DROPOUT,
        "forward",
    ),
    sm80(
        "all warps take the draws of even tiles of keys",
        "backward",
        "attention/dropout.cuh",
        "const bool second = key / 16 % 2;",
        "const bool second = false;",
        DROPOUT,
        "forward",
    ),
    sm80(
        "pairs that a mask hides beside a block mask are one element further on",
        "forward",
        "attention/hidden_pairs.cuh",
        "1u << (kBits - 4 + j)",
        "1u << (kBits - 5 + j)",
        MASKED_BLOCKS,
        "forward",
    ),
    sm80(
        "beside a block mask later columns are those of the first",
        "forward",
        "attention/hidden_pairs.cuh",
        "shown_by_options(j, 2 * i)",
        "shown_by_options(j)",
        MASKED_BLOCKS,
        "forward",
    ),
    sm80(
        "dropout bits are not transposed",
        "backward",
        "attention/survivors.cuh",
        "kTransposed ? transposed(drawn) : drawn",
        "drawn",
        DROPOUT,
        "forward",
    ),
    sm80(
        "packed sums of dQ begin where those of the sequence before end",
        "backward",
        "attention/packed.cuh",
        "sequence.first_query / kBlockM + number(sequence) + tile",
        "sequence.first_query / kBlockM + tile",
        PACKED,
        "forward",
    ),
]
CASES = [(mutant, way) for mutant in MUTANTS for way in mutant.ways]
FIRST_CASES = [(mutant, mutant.ways[0]) for mutant in MUTANTS if not mutant.slow]


def cases_without_mistakes(cases: list[tuple[Mutant, str]]) -> set[tuple[Any, ...]]:
    return {(mutant.direction, mutant.problem, way, mutant.family) for mutant, way in cases}


def thorough_unless(case: tuple[Any, ...], chosen: Collection[tuple[Any, ...]]) -> Any:
    """Make a parameter of a case: one way to see each mistake is enough."""
    return pytest.param(*case, marks=[] if case in chosen else [pytest.mark.thorough])


@contextmanager
def numpy_arrays_on(device: HostDevice, family: str, *, one_stage: bool = False) -> Iterator[None]:
    """Calls on NumPy arrays take the kernels' path, with the tiles of the family fixed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "numpy_backend", LaunchBackend(device))
        patch.setattr(_parts, "MIN_TILES", 1)
        patch.setattr(_dbias, "MIN_TILES", 1)
        for kib in _dbias.SM80_TILES[2]:
            patch.setitem(_dbias.SM80_TILES[2], kib, (_dbias.Sm80Tile(64, 64, 4, 2, 32, 3),))
        for table, tile in (TILES_OF_ONE_STAGE if one_stage else TILES).items():
            patch.setitem(getattr(_wmma, table), (2, 64), [tile])
        patch.delitem(_sm80_tiles.SHORT_TILES, (64, 64))
        for own in (_sm80_tiles.FRUGAL_TILES, _sm80_tiles.BACKWARD_FRUGAL_TILES):
            patch.delitem(own, (64, 64, 99))
        for table, sm80_tile in (SM80_TILES_OF_ONE_STAGE if one_stage else SM80_TILES).items():
            tiles = getattr(_sm80_tiles, table)
            for key in [key for key in tiles if key[:2] == (64, 64)]:
                patch.setitem(tiles, key, (sm80_tile,))
        yield


def run(
    direction: str, problem: Problem | AttentionProblem | PackedProblem, way: str, cuda_src: Path, family: str
) -> None:
    """Compute the problem and check the result against the reference."""
    if isinstance(problem, Problem):
        run_plain(direction, problem, way, cuda_src, family)
    else:
        run_with_options(direction, problem, way, cuda_src, family)


def run_plain(direction: str, problem: Problem, way: str, cuda_src: Path, family: str) -> None:
    chip = replace(HOST_CHIP, multiprocessors=100 if problem.in_parts else 1)
    device = HostDevice(chip, **WAYS[way], isolated=True, timeout=60, cuda_src=cuda_src)
    if not can_instrument(device.flavour):
        pytest.skip(f"the compiler cannot link {device.flavour}")
    dout, q, k, v = problem.arrays()
    if direction == "forward":
        with numpy_arrays_on(device, family, one_stage=problem.one_stage):
            out, lse = cuflash.attention(q, k, v, return_lse=True, kernel=family, **problem.options)
        assert_attention_accurate(q, k, v, out, lse, **problem.options)
    else:
        out, lse = cuflash.attention(q, k, v, return_lse=True, **problem.options)
        options = problem.options | {"kernel": family, "deterministic": problem.deterministic}
        with numpy_arrays_on(device, family, one_stage=problem.one_stage):
            gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
        assert_gradients_accurate(dout, q, k, v, *gradients, **problem.options)


def run_with_options(
    direction: str, problem: AttentionProblem | PackedProblem, way: str, cuda_src: Path, family: str
) -> None:
    ring, device = host_ring(family), HostDevice(**WAYS[way], cuda_src=cuda_src)
    if isinstance(problem, PackedProblem):
        with numpy_arrays_on(device, family):
            (ring.check_varlen_forward if direction == "forward" else ring.check_varlen)(problem)
    elif direction == "forward":
        with numpy_arrays_on(device, family):
            ring.check_forward(problem)
    else:
        check_backward_alone(problem, device, family)


def check_backward_alone(problem: AttentionProblem, device: HostDevice, family: str) -> None:
    """The forward is NumPy's: a kernel less to compile."""
    arrays, dout, dlse = problem.arrays(), problem.dout(), problem.dlse()
    out, lse = cuflash.attention(*arrays, return_lse=True, **problem.options)
    names = [name for name in ("bias", "sinks") if name in problem.options]
    options = problem.options_for(np, "expression") | {f"return_d{name}": True for name in names}
    with numpy_arrays_on(device, family):
        dq, dk, dv, *others = cuflash.attention_backward(dout, *arrays, out, lse, dlse=dlse, kernel=family, **options)
    judged = {f"d{name}": gradient for name, gradient in zip(names, others, strict=True)}
    assert_gradients_accurate(dout, *arrays, dq, dk, dv, dlse=dlse, **judged, **problem.options)


@pytest.mark.parametrize(
    ("mutant", "way"),
    [thorough_unless(case, FIRST_CASES) for case in CASES],
    ids=lambda value: str(value).replace(" ", "_"),
)
def test_mutants_are_caught(mutant: Mutant, way: str, tmp_path: Path) -> None:
    cuda_src = seed_mistake(tmp_path, mutant.file, mutant.old, mutant.new)
    with pytest.raises((HostCudaError, AssertionError)) as error:
        run(mutant.direction, mutant.problem, way, cuda_src, mutant.family)
    assert not isinstance(error.value, CompileError), "a mutant that does not compile proves nothing"


@pytest.mark.parametrize(
    ("direction", "problem", "way", "family"),
    [
        thorough_unless(case, {case for case in cases_without_mistakes(FIRST_CASES) if case[2] != "forward"})
        for case in sorted(cases_without_mistakes(CASES), key=str)
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_the_kernels_themselves_are_not(direction: str, problem: Problem, way: str, family: str) -> None:
    run(direction, problem, way, CUDA_SRC, family)


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 12
    assert {mutant.direction for mutant in MUTANTS} == {"forward", "backward"}
    assert {way for _, way in FIRST_CASES} >= {"forward", "greedy", "pairs", "lazy", "asan", "tsan"}
