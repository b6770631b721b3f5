"""The sm80 family: FlashAttention-2 by mma.sync, for Ampere and everything since (cuda_src/cuflash/kernels/fwd_sm80.cuh)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._call import Call, Run
from ._device import Array, Chip
from ._kernel import NUMBERS, Kernel, padded_head_dims
from ._options import PLAIN, Options
from ._problem import Operand, Problem
from ._wmma import num_jobs, why_no_backward
from ._wmma import plan_backward as plan_backward

__all__ = ["forward", "plan_backward", "plan_forward", "why_no_backward", "why_not"]

CAPABILITY = (8, 0)
WORK_BYTES = 240  # what a block knows of its job
MIN_SCALE = float(np.finfo(np.float32).tiny)  # less is 0 for kernels, and maxima of products are not those of scores


class Tile(NamedTuple):
    """Queries of a block of threads, keys of a step, warps, stages of K and V, and whether Q stays in registers."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    keeps_q: bool = False


# By (head_dim, head_dim_v), and by the KiB of shared memory that a block may use: those of the largest class that a
# chip reaches. The first that suits the call and fits is taken, so further ones are for calls with arrays of pairs.
# A multiprocessor has 64 K registers: two blocks of 4 warps at 255, or one of 8, and shared memory for two of
# 113 KiB (sm_90), 81 (sm_80) or 50 (sm_86, 89, 120).
Tiles = dict[tuple[int, int], dict[int, tuple[Tile, ...]]]

SMALLEST = Tile(64, 32, 4, 1)  # fits everywhere
FORWARD_TILES: Tiles = {
    # 32 rows a warp: K and V are read from shared memory half as often as with 16.
    (32, 32): {99: (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST)},
    (64, 64): {99: (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST)},
    (96, 96): {
        99: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), SMALLEST),
        163: (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST),
    },
    # Two stages of 64 keys take a few registers too many.
    (128, 128): {
        99: (Tile(128, 32, 4, 1), SMALLEST),
        163: (Tile(128, 64, 4, 1), SMALLEST),
    },
    (192, 128): {
        99: (Tile(64, 64, 4, 1), SMALLEST),
        163: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), SMALLEST),
        227: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), SMALLEST),
    },
    # Output of 32 rows would take 192 registers or more: 16 rows a warp.
    (192, 192): {
        99: (Tile(64, 64, 4, 1), SMALLEST),
        163: (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), SMALLEST),
        227: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), SMALLEST),
    },
    (256, 256): {
        99: (Tile(64, 64, 4, 1), SMALLEST),
        163: (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), SMALLEST),
        227: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), SMALLEST),
    },
}


def why_not(
    problem: Problem, number: str, chip: Chip, options: Options = PLAIN, operands: Mapping[str, Operand] | None = None
) -> str | None:
    """The reason why the family cannot compute the problem on a GPU, or None if it can."""
    if chip.capability < CAPABILITY:
        return (
            f"it needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, "
            f"{chip.name} has {chip.capability[0]}.{chip.capability[1]}"
        )
    if number not in ("float16", "bfloat16"):
        return f"it multiplies float16 and bfloat16, not {problem.dtype}"
    if problem.softmax_scale < MIN_SCALE:
        return f"it takes scales from {MIN_SCALE:.3g}, not {problem.softmax_scale}"
    if _tile(FORWARD_TILES, _forward_bytes, problem, options, chip) is None:
        return f"{chip.name} has too little shared memory for a tile with {', '.join(options.arguments)}"
    return None


def _forward_bytes(dims: tuple[int, int], tile: Tile, options: Options) -> int:
    """Tiles of Q, K and V, of arrays of pairs, and those of careful rows (attention/careful_row.cuh)."""
    pairs, careful = options.tile_bytes(*tile[:2]), options.tile_bytes(1, 32)
    stage = 2 * tile.block_n * sum(dims) + max(pairs, 16)
    return 2 * tile.block_m * dims[0] + tile.stages * stage + tile.warps * max(careful, 16) + WORK_BYTES


def _tile(tiles: Tiles, shared_bytes: Any, problem: Problem, options: Options, chip: Chip) -> Tile | None:
    """The tile that suits a call, or None if none fits the shared memory."""
    dims = padded_head_dims(problem)
    classes = tiles[dims]
    of_chip = max((kib for kib in classes if kib * 1024 <= chip.shared_memory), default=min(classes))
    return next(
        (
            tile
            for tile in classes[of_chip]
            if options.allows_tile(*tile[:2]) and shared_bytes(dims, tile, options) <= chip.shared_memory
        ),
        None,
    )


def forward(problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, int]:
    """The kernel to launch, and the number of its blocks."""
    name, short, _ = NUMBERS[number]
    dims, tile = padded_head_dims(problem), _tile(FORWARD_TILES, _forward_bytes, problem, options, chip)
    assert tile is not None, "why_not has found one"
    kernel = Kernel(
        template="FwdSm80",
        header="fwd_sm80",
        symbol="_".join(("cuflash_fwd_sm80", short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, *tile[:4], str(tile.keeps_q).lower()),
        pointers=("const Element* q", "const Element* k", "const Element* v", "Element* out", "float* lse"),
        params="FwdParams",
        num_threads=32 * tile.warps,
        shared_bytes=_forward_bytes(dims, tile, options),
        options=options,
    )
    return kernel, num_jobs(problem, problem.seqlen_q, tile.block_m) * problem.num_heads


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
    step = call.step(forward(call.problem, call.options, call.number, call.chip))
    null = call.device.null

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        step(q, k, v, out, null if lse is None else lse, options=call.options_argument(extras))

    return run
