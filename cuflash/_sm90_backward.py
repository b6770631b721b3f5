"""The backward of the sm90 family: its kernels with their tiles (cuda_src/cuflash/kernels/bwd_sm90*.cuh)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _sm90_dq
from ._call import Call, Run
from ._device import Array, Chip
from ._gradients import Inputs, Workspace, operand_of_delta, plan_gradients
from ._kernel import NUMBERS, Kernel, num_key_jobs, num_query_jobs
from ._options import Options
from ._params import PARAMS, fill
from ._problem import Problem, ceil_div
from ._sm90_block import JOB_BYTES
from ._tensor_maps import PANEL, MappedParams
from ._wgmma import ARCH, wgmma

ROUND_KEYS_BYTES = 64  # attention/dropout.cuh
NUM_THREADS = 384
WARPS_OF_FINISH = 8

# Beyond so many columns dK and dV of 64 keys fill the registers of two consumers; and adding up dQ in memory would take
# longer than the two products more of a kernel for dQ alone (docs/notes/sm90_backward.md).
NARROW = 128


class Tile(NamedTuple):
    """Queries of a tile, keys of a job, and how many tiles of K and V, of Q and dO, and of pairs are held."""

    block_m: int
    block_n: int
    stages_kv: int
    stages: int
    stages_pairs: int


# By head_dim and head_dim_v, the fastest first; the first that fits the shared memory is taken, with pairs the first
# that has two places for them. Measured on an H200 (docs/notes/sm90_backward.md). A consumer holds 64 keys: dK and dV
# of 128 columns leave registers for 64 queries, those of 64 columns for 128; beyond 128 columns both consumers have the
# same 64 keys. A second place for K and V lets the next job's come beside the epilogue, one for pairs lets biases,
# masks and survivors come ahead.
TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 64): (
        *(Tile(128, 128, *stages) for stages in ((2, 2, 2), (1, 2, 2))),
        *(Tile(64, 128, *stages) for stages in ((2, 4, 2), (2, 2, 2))),
    ),
    (128, 128): tuple(Tile(64, 128, *stages) for stages in ((2, 2, 1), (1, 2, 2), (1, 2, 1))),
    (192, 128): (Tile(64, 64, 2, 2, 2),),
    (192, 192): (Tile(64, 64, 2, 2, 2), Tile(64, 64, 1, 2, 2)),
    (256, 256): (Tile(64, 64, 1, 2, 2), Tile(64, 64, 1, 2, 1)),
}


def why_not(problem: Problem, options: Options, chip: Chip) -> str | None:
    """The reason why there is no kernel for a problem that the forward can do, or None if there is one."""
    tiles = (_tile(problem, options, chip, False), _sm90_dq.tile(_dims(problem), options, chip))
    if None in tiles:
        return f"{chip.name} has too little shared memory for a tile with {', '.join(options.arguments)}"
    return None


def _dims(problem: Problem) -> tuple[int, int]:
    """The head_dim and head_dim_v of the kernels: TMA fills what is missing with zeros."""
    return next(dims for dims in TILES if problem.head_dim <= dims[0] and problem.head_dim_v <= dims[1])


def _pair_bytes(tile: Tile, options: Options) -> int:
    """Biases, masks and survivors of a tile."""
    survivors = tile.block_m * tile.block_n // 8 + ROUND_KEYS_BYTES if "dropout" in options.names else 0
    return options.tile_bytes(tile.block_m, tile.block_n) + survivors


def _shared_bytes(dims: tuple[int, int], tile: Tile, options: Options, adds_dq: bool) -> int:
    """Tiles in panels of 128-byte rows, what is known of pairs, statistics of rows, rings of barriers and jobs."""
    row = 128 * sum(ceil_div(dim, PANEL) for dim in dims)
    tiles = row * (tile.stages_kv * tile.block_n + tile.stages * tile.block_m)
    handed = 16  # from consumer to consumer: nothing
    if adds_dq:  # gradients of scores, twice
        handed = 2 * tile.block_n * 128 * ceil_div(tile.block_m, PANEL)
    elif dims[0] > NARROW:  # weights
        handed = 2 * tile.block_n * tile.block_m
    pairs = tile.stages_pairs * max(_pair_bytes(tile, options), 16)
    rows = tile.stages * 8 * tile.block_m
    stages_of_jobs = 2 * tile.stages_kv
    stages = tile.stages_kv + 3 * tile.stages + tile.stages_pairs + stages_of_jobs
    rings = 16 * stages + ceil_div(JOB_BYTES * stages_of_jobs, 8) * 8
    return tiles + handed + pairs + rows + rings


def _adds_dq(dims: tuple[int, int], deterministic: bool) -> bool:
    """Whether the main kernel adds to sums of dq, or another one computes it."""
    return dims[0] <= NARROW and not deterministic


def _tile(problem: Problem, options: Options, chip: Chip, deterministic: bool) -> Tile | None:
    """The tile that suits a call, or None if none fits the shared memory."""
    dims = _dims(problem)
    adds_dq = _adds_dq(dims, deterministic)
    fitting = [
        tile
        for tile in TILES[dims]
        if options.allows_tile(*tile[:2]) and _shared_bytes(dims, tile, options, adds_dq) <= chip.shared_memory
    ]
    return next(
        (tile for tile in fitting if tile.stages_pairs > 1 and _pair_bytes(tile, options)), next(iter(fitting), None)
    )


class Kernels(NamedTuple):
    """The main kernel, the one that comes last, the tile of the first; and one for dq, where the first adds none."""

    main: Kernel
    finish: Kernel
    tile: Tile
    of_dq: _sm90_dq.KernelOfTile | None
    block_m: int  # queries of a tile of dq


def kernels(problem: Problem, options: Options, number: str, chip: Chip, *, deterministic: bool = False) -> Kernels:
    """The kernels that compute the gradients of a call."""
    name, short, _ = NUMBERS[number]
    dims, tile = _dims(problem), _tile(problem, options, chip, deterministic)
    assert tile is not None, "why_not has found one"
    adds_dq = _adds_dq(dims, deterministic)
    of_dq = None if adds_dq else _sm90_dq.kernel(dims, options, number, chip)
    cols_of_dq = {dims[0] * tile.block_m // 128} if adds_dq else set()  # that a consumer computes
    of_call = "_".join((short, f"d{dims[0]}x{dims[1]}", *options.names))
    template, header = "BwdSm90DkDv", "bwd_sm90_dkdv"
    if adds_dq:
        template, header = "BwdSm90", "bwd_sm90"
    elif dims[0] > NARROW:
        template, header = "BwdSm90DkDvWide", "bwd_sm90_dkdv_wide"
    main = Kernel(
        template=template,
        header=header,
        symbol=f"cuflash_{'bwd_sm90' if adds_dq else 'bwd_sm90_dkdv'}_{of_call}",
        arguments=(f"cuflash::{name}", options.type, *dims, *tile),
        pointers=(
            *("const float* lse_log2", "const float* delta", "float* dq_sums", "unsigned* spoiled"),
            *("Element* dk", "Element* dv", "unsigned* counter"),
        ),
        params="BwdSm90Params",
        num_threads=NUM_THREADS,
        shared_bytes=_shared_bytes(dims, tile, options, adds_dq),
        options=options,
        definitions="".join(wgmma(number, width) for width in sorted({tile.block_m, *dims} | cols_of_dq)),
        arch=ARCH,
    )
    block_m = tile.block_m if of_dq is None else of_dq.tile.block_m
    finish = Kernel(
        template="BwdSm90Finish",
        header="bwd_sm90_finish",
        symbol=f"cuflash_bwd_sm90_finish{'' if adds_dq else '_without_sums'}_{of_call}",
        arguments=(f"cuflash::{name}", options.type, *dims, block_m, tile.block_n, str(adds_dq).lower()),
        pointers=(
            *("const Element* q", "const Element* k", "const Element* v", "const Element* dout"),
            *("const float* lse", "const float* delta", "float* dq_sums"),
            *("const unsigned* spoiled_queries", "const unsigned* spoiled_keys"),
            *("Element* dq", "Element* dk", "Element* dv"),
        ),
        params="BwdParams",
        num_threads=32 * WARPS_OF_FINISH,
        shared_bytes=WARPS_OF_FINISH * max(options.tile_bytes(16, 16), 16),
        options=options,
    )
    return Kernels(main, finish, tile, of_dq, block_m)


def plan(call: Call) -> Run:
    """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
    device, problem, operands = call.device, call.problem, call.operands
    made = kernels(problem, call.options, call.number, call.chip, deterministic=call.deterministic)
    main, finish, tile, of_dq, block_m = made
    delta = operand_of_delta(problem)
    key_tiles, query_tiles = num_key_jobs(problem, tile.block_n), num_query_jobs(problem, block_m)
    num_jobs = max(key_tiles, query_tiles)
    if num_jobs >= 2**31 - call.chip.multiprocessors:  # blocks ask once in vain
        raise NotImplementedError(f"the call needs {num_jobs} jobs; the kernels count to {2**31 - 1}")

    params = np.zeros(1, PARAMS["BwdSm90Params"])
    params["bwd"] = fill("BwdParams", problem, {**operands, "delta": delta})

    def add(kernel: Kernel, num_jobs: int, block_m: int, block_n: int) -> Callable[..., None]:
        """A kernel whose blocks take such jobs, and find the inputs in boxes of so many rows."""
        step = call.add((kernel, min(num_jobs, call.chip.multiprocessors)))
        rows = {"q": block_m, "k": block_n, "v": block_n, "dout": block_m}
        mapped = MappedParams(device, call.number, params, operands, rows)

        def launch(arrays: tuple[Array, ...], inputs: tuple[Array, ...], options: tuple[Any, ...]) -> None:
            step.launch(step.num_blocks, (*arrays, device.counter(), mapped(*inputs), *options))

        return launch

    start_main = add(main, key_tiles, *tile[:2])
    start_dq = None if of_dq is None else add(of_dq.kernel, query_tiles, *of_dq.tile[:2])
    finish_step = call.step((finish, query_tiles + ceil_div(key_tiles, WARPS_OF_FINISH)), delta=delta)
    # Sums of dq, or a word for each of its tiles; and one for each tile of keys.
    num_sums = query_tiles * (tile.block_m * _dims(problem)[0] if of_dq is None else 1)

    def products(
        inputs: Inputs, workspace: Workspace, dq: Array, dk: Array, dv: Array, options: tuple[Any, ...]
    ) -> None:
        (q, k, v, dout, lse, delta), (sums, lse_log2) = inputs, workspace
        spoiled_keys = sums[num_sums:]
        start_main((lse_log2, delta, sums, spoiled_keys, dk, dv), (q, k, v, dout), options)
        if start_dq is not None:
            start_dq((lse, delta, sums, dq), (q, k, v, dout), options)
        finish_step(*inputs, sums, sums, spoiled_keys, dq, dk, dv, options=options)

    return plan_gradients(call, products, ceil_div(num_sums + key_tiles, 4) * 4, wants_lse_log2=True)
