"""The sm90 family, for Hopper, and its forward with the tiles (cuda_src/cuflash/kernels/fwd_sm90.cuh)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import _parts, _sm90_backward
from ._call import Call, Run
from ._device import Array, Chip
from ._kernel import MIN_SCALE, NUMBERS, Kernel, num_query_jobs, padded_head_dims
from ._options import PLAIN, Options
from ._params import PARAMS, fill
from ._problem import Operand, Problem
from ._sm90_block import Tile, shared_bytes
from ._tensor_maps import PANEL, MappedParams, why_not_array
from ._wgmma import ARCH, wgmma

CAPABILITY = (9, 0)

# By (head_dim, head_dim_v), the fastest first; the first that suits the call and fits the shared memory is taken, and
# the last for many options. Measured on an H200 (docs/notes/sm90.md). Two consumers have 232 registers a thread, three
# have 160.
TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    # Three consumers hide the exponentials best; causal rows below 2048 are too short for 192, and some options need
    # the registers of fewer keys, or of two consumers.
    (64, 64): (Tile(192, 128, 2, 4, 4), Tile(192, 96, 2, 4, 4), Tile(128, 128, 3, 4, 4)),
    (96, 96): (Tile(128, 128, 2, 2, 2),),
    # A second place for Q lets a job begin beside the epilogue of the one before it.
    (128, 128): (Tile(128, 128, 2, 2, 2), Tile(128, 96, 2, 2, 2)),
    (192, 128): (Tile(128, 128, 1, 2, 2), Tile(128, 96, 1, 2, 2)),
    (192, 192): (Tile(128, 96, 1, 2, 2), Tile(128, 64, 1, 2, 2)),
    # 256 columns of output leave registers for 64 keys.
    (256, 256): (Tile(128, 64, 1, 3, 2),),
}
# The same for calls with arrays of pairs: a bias or a mask.
PAIR_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 64): (
        Tile(192, 128, 2, 2, 4, 2),
        Tile(192, 128, 2, 2, 2, 2),
        Tile(128, 128, 2, 2, 3, 2),
        Tile(128, 128, 2, 2, 2, 1),
    ),
    (96, 96): (Tile(128, 128, 1, 2, 2, 2), Tile(128, 128, 1, 2, 2, 1), Tile(128, 64, 1, 2, 2, 1)),
    (128, 128): (Tile(128, 128, 1, 2, 2, 2), Tile(128, 128, 1, 2, 1, 2), Tile(128, 64, 1, 2, 2, 1)),
    (192, 128): (Tile(128, 128, 1, 2, 2, 1), Tile(128, 64, 1, 2, 2, 1)),
    (192, 192): (Tile(128, 64, 1, 2, 2, 1),),
    (256, 256): (Tile(128, 64, 1, 2, 2, 1), Tile(128, 64, 1, 1, 1, 1)),
}
LONG_CAUSAL = 2048
# For how many options three consumers have registers, with so many keys; and two consumers with their larger tile.
ROOM_OF_THREE = {128: 1, 96: 3}
ROOM_OF_TWO = 2


def why_not(
    problem: Problem, number: str, chip: Chip, options: Options = PLAIN, operands: Mapping[str, Operand] | None = None
) -> str | None:
    """The reason why the family cannot compute the problem on a GPU, or None if it can."""
    if chip.capability != CAPABILITY:
        return f"it needs compute capability 9.0, {chip.name} has {chip.capability[0]}.{chip.capability[1]}"
    if number not in ("float16", "bfloat16"):
        return f"it multiplies float16 and bfloat16, not {problem.dtype}"
    if min(problem.batch, problem.seqlen_q, problem.seqlen_k) == 0:
        return "it takes at least one sequence, query and key"
    if problem.softmax_scale < MIN_SCALE:
        return f"it takes scales from {MIN_SCALE:.3g}, not {problem.softmax_scale}"
    if _tile(problem, options, chip) is None:
        return f"{chip.name} has too little shared memory for a tile with {', '.join(options.arguments)}"
    by_tma = ("q", "k", "v", "out", "dout")
    reasons = (why_not_array(name, array) for name, array in (operands or {}).items() if name in by_tma)
    return next((reason for reason in reasons if reason is not None), None)


def why_no_backward(problem: Problem, chip: Chip, options: Options = PLAIN) -> str | None:
    """The reason why the family cannot compute the gradients of what it can compute."""
    return _sm90_backward.why_not(problem, options, chip)


def _dims(problem: Problem) -> tuple[int, int]:
    """Head dimensions of the kernel: TMA fills what is missing with zeros."""
    dims = padded_head_dims(problem)
    return max(dims[0], PANEL), max(dims[1], PANEL)


def _tile(problem: Problem, options: Options, chip: Chip) -> Tile | None:
    """The tile that suits a call, or None if none fits the shared memory."""
    dims, has_pairs = _dims(problem), options.tile_bytes(1, 32) > 0
    tiles = [
        tile
        for tile in (PAIR_TILES if has_pairs else TILES)[dims]
        if options.allows_tile(tile.block_m, tile.block_n)
        and shared_bytes(dims, tile, options) <= chip.shared_memory
        and (tile.block_m <= 128 or _suits_three_consumers(problem, options, tile))
    ]
    if not tiles:
        return None
    takes_smaller = _num_hungry(options) > ROOM_OF_TWO and not has_pairs and tiles[0].block_m <= 128
    return tiles[-1] if takes_smaller else tiles[0]


def _num_hungry(options: Options) -> int:
    """The number of options that take registers."""
    return len({*options.names} - {"sinks"})


def _shows_all(problem: Problem) -> bool:
    """Whether the band hides no pair."""
    band = problem.band
    return band.end >= problem.seqlen_k and band.begin <= -problem.seqlen_q


def _suits_three_consumers(problem: Problem, options: Options, tile: Tile) -> bool:
    length, full = problem.seqlen_q, _shows_all(problem) and not problem.packed
    if problem.packed:  # of different lengths the longer half does most of the work
        length = 2 * length // problem.batch
    return _num_hungry(options) <= ROOM_OF_THREE.get(tile.block_n, 0) and (full or length >= LONG_CAUSAL)


def forward(problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, Tile, int]:
    """The kernel to launch, its tile, and the number of its jobs."""
    name, short, _ = NUMBERS[number]
    dims, tile = _dims(problem), _tile(problem, options, chip)
    assert tile is not None, "why_not has found one"
    kernel = Kernel(
        template="FwdSm90",
        header="fwd_sm90",
        symbol="_".join(("cuflash_fwd_sm90", short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, *tile),
        pointers=("Element* out", "float* lse", "unsigned* counter"),
        params="FwdSm90Params",
        num_threads=128 * (1 + tile.block_m // 64),
        shared_bytes=shared_bytes(dims, tile, options),
        options=options,
        definitions="".join(wgmma(number, width) for width in sorted({tile.block_n, dims[1]})),
        arch=ARCH,
    )
    return kernel, tile, num_query_jobs(problem, tile.block_m)


def is_slower_than_sm80(call: Call) -> bool:
    """Whether a forward is one of those that sm80 computes faster (docs/notes/sm80.md).

    Jobs are so few, and keys so many, that split-KV is better, which this family has not: at least 4 parts of 1024 keys
    or more.
    """
    _, tile, num_jobs = forward(call.problem, call.options, call.number, call.chip)
    return _parts.num_parts(call.problem, num_jobs, call.chip.multiprocessors, tile.block_m, 1024) >= 4


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
    device, operands = call.device, call.operands
    kernel, tile, num_jobs = forward(call.problem, call.options, call.number, call.chip)
    if num_jobs >= 2**31 - call.chip.multiprocessors:  # blocks ask once in vain
        raise NotImplementedError(f"the call needs {num_jobs} jobs; the kernel counts to {2**31 - 1}")
    num_blocks = min(num_jobs, call.chip.multiprocessors)
    step = call.add((kernel, num_blocks))
    params = np.zeros(1, PARAMS["FwdSm90Params"])
    params["fwd"] = fill("FwdParams", call.problem, operands)
    rows = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n}
    mapped = MappedParams(device, call.number, params, operands, rows)

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        lse = device.null if lse is None else lse
        step.launch(num_blocks, (out, lse, device.counter(), mapped(q, k, v), *call.options_argument(extras)))

    return run


def plan_backward(call: Call) -> Run:
    """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
    return _sm90_backward.plan(call)
