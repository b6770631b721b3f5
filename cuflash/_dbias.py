"""The gradient of a bias, for every family: which of its kernels computes it, and their tiles (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._call import Call
from ._device import Array, Chip
from ._features import ELEMENTS
from ._kernel import BACKWARD_INPUTS, NUMBERS, Kernel, mma_number, num_places, padded_head_dims, pitch
from ._options import Options
from ._params import PARAMS, fill
from ._problem import FULL, Operand, Problem, ceil_div
from ._tensor_maps import PANEL, MappedParams, why_not_array
from ._wgmma import ARCH, wgmma

TILE_BYTES, WALK_BYTES = 24, 100  # of a tile of pairs, and of the way through them (attention/bias_tiles.cuh)
MIN_TILES = 32  # that blocks stay for, if the tiles differ in length: then those of each make up for it


class Sm90Tile(NamedTuple):
    """Rows and columns of a block's gradient, how many panels and tiles of pairs are held, and blocks of a cluster."""

    block_m: int
    block_n: int
    stages: int
    stages_pairs: int
    cluster: int


class Sm80Tile(NamedTuple):
    """Rows and columns of a block's gradient, warps, those that share their rows, columns of a panel, stages."""

    block_m: int
    block_n: int
    warps: int
    splits: int
    panel: int
    stages: int


class WmmaTile(NamedTuple):
    """Rows and columns of a block's gradient, warps, stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 1


Tile = Sm80Tile | WmmaTile

# The first that fits. 128 x 128 is what registers hold: 64 each of sums, scores, gradients of weights. Four panels are
# two tiles of pairs at head dimension 64, one at 128. Two blocks of a cluster take a quarter less from L2. With two
# places for pairs those of the next tile of the gradient come ahead; one is for a float32 bias, or a bias and a mask.
SM90_TILES = (
    *(Sm90Tile(128, 128, 4, stages_pairs, 2) for stages_pairs in (2, 1)),
    *(Sm90Tile(128, 128, 4, stages_pairs, 1) for stages_pairs in (2, 1)),
)
SM90_THREADS = 384
MIN_SHARED = 1024  # keys from which on it costs little if the last cluster has but one block with keys
# By the bytes of an element, and by the KiB of shared memory that a block may use, those of the largest class that a
# chip reaches; for all head dimensions that are whole panels. What counts is how often Q, dO, K and V come from L2:
# 128 x 128 makes 64 operations of a byte, 128 x 64 makes 43. 8 warps, since two of them hide what one waits for.
SM80_TILES: dict[int, dict[int, tuple[Sm80Tile, ...]]] = {
    2: {
        # Tensor cores that are slow enough for 43. With two stages there is room for a float32 bias and a mask as well.
        99: (Sm80Tile(128, 64, 8, 2, 32, 3), Sm80Tile(128, 64, 8, 2, 32, 2)),
        # Two stages of 64 columns would want 1 KiB more than there is.
        163: (Sm80Tile(128, 128, 8, 2, 32, 3), Sm80Tile(128, 128, 8, 2, 32, 2)),
        # With 64 columns there are half the barriers. The other one is for D 32 and 96.
        227: (Sm80Tile(128, 128, 8, 2, 64, 2), Sm80Tile(128, 128, 8, 2, 32, 3)),
    },
    # Of float32 factors in parts take registers too. A third stage gains nothing.
    4: {
        99: (Sm80Tile(64, 64, 8, 2, 32, 2),),
        163: (Sm80Tile(128, 64, 8, 2, 32, 2),),
    },
}
# By (bytes of an element, head_dim), the fastest first: of 2 bytes for the 64 KiB of sm_75, of 4 for 99 and more.
WMMA_TILES = {
    (2, 32): (WmmaTile(128, 64, 4), WmmaTile(64, 64, 4)),
    (2, 64): (WmmaTile(64, 64, 4),),
    (2, 96): (WmmaTile(64, 64, 4), WmmaTile(32, 32, 2)),
    (2, 128): (WmmaTile(32, 32, 2),),
    (2, 192): (WmmaTile(32, 32, 2),),
    (2, 256): (WmmaTile(16, 32, 1),),
    (4, 32): (WmmaTile(64, 32, 4),),
    (4, 64): (WmmaTile(64, 32, 4),),
    (4, 96): (WmmaTile(64, 32, 4), WmmaTile(32, 32, 2)),
    (4, 128): (WmmaTile(32, 32, 2),),
    (4, 192): (WmmaTile(32, 32, 2), WmmaTile(16, 16, 1)),
    (4, 256): (WmmaTile(32, 32, 2), WmmaTile(16, 16, 1)),
}


def plan(call: Call, delta: Operand, *, by_mma: bool) -> Callable[..., None]:
    """A function of q, k, v, dout, lse, delta and dbias, and the options of kernels, that computes dbias."""
    dbias = call.operands["dbias"]
    if why_not_sm90(call) is not None:
        of_call = call.problem, call.options, call.number, call.chip, dbias
        return call.step(backward_dbias(*of_call, by_mma=by_mma), delta=delta)
    kernel, tile, num_blocks = sm90(call.problem, call.options, call.number, call.chip, dbias)
    step = call.add((kernel, num_blocks))
    params = np.zeros(1, PARAMS["DbiasSm90Params"])
    params["dbias"] = fill("DbiasParams", call.problem, {**call.operands, "delta": delta})
    rows = {"q": 64, "k": tile.block_n, "v": tile.block_n, "dout": 64}
    mapped = MappedParams(call.device, call.number, params, call.operands, rows)

    def run(
        q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, dbias: Array, *, options: tuple[Any, ...]
    ) -> None:
        step.launch(num_blocks, (lse, delta, dbias, mapped(q, k, v, dout), *options))

    return run


def why_not_sm90(call: Call) -> str | None:
    """The reason why the kernel on wgmma cannot compute the gradient of a call's bias, or None if it can."""
    if call.chip.capability != (9, 0) or NUMBERS[call.number][2] != 2:
        return "it needs compute capability 9.0, and numbers of 16 bits"
    if 1 in call.operands["dbias"].shape[2:]:
        return "pairs of one tile share a row or a column"
    if _sm90_tile(call.problem, call.options, call.chip) is None:
        return "arrays of pairs take too much shared memory"
    reasons = (why_not_array(name, call.operands[name]) for name in ("q", "k", "v", "dout"))
    return next((reason for reason in reasons if reason is not None), None)


def _sm90_tile(problem: Problem, options: Options, chip: Chip) -> Sm90Tile | None:
    def suits(tile: Sm90Tile) -> bool:
        cols = tile.block_n * tile.cluster
        wasteful = -problem.seqlen_k % cols >= tile.block_n and problem.seqlen_k < MIN_SHARED
        fits = _sm90_shared_bytes(options, tile) <= chip.shared_memory
        return fits and options.allows_tile(tile.block_m, cols) and not wasteful

    return next(filter(suits, SM90_TILES), None)


def _sm90_shared_bytes(options: Options, tile: Sm90Tile) -> int:
    """Panels, tiles of pairs, statistics of rows for two tiles, rings of barriers, and the way through four tiles."""
    panels = tile.stages * 2 * PANEL * (tile.block_m + tile.block_n)
    pairs = tile.stages_pairs * options.tile_bytes(tile.block_m, tile.block_n)
    rings = 16 * (tile.stages + tile.stages_pairs + 2 + 4)
    return panels + pairs + 2 * 8 * tile.block_m + rings + 4 * TILE_BYTES + WALK_BYTES


def sm90(problem: Problem, options: Options, number: str, chip: Chip, dbias: Operand) -> tuple[Kernel, Sm90Tile, int]:
    """The kernel on wgmma, its tile, and the number of its blocks."""
    name, short, _ = NUMBERS[number]
    tile = _sm90_tile(problem, options, chip)
    assert tile is not None, "why_not_sm90 has found one"
    dims = [PANEL * ceil_div(dim, PANEL) for dim in (problem.head_dim, problem.head_dim_v)]
    kernel = Kernel(
        template="BwdSm90Dbias",
        header="bwd_sm90_dbias",
        symbol="_".join(("cuflash_bwd_sm90_dbias", short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, *tile),
        pointers=("const float* lse", "const float* delta", f"{ELEMENTS[dbias.dtype]}* dbias"),
        params="DbiasSm90Params",
        num_threads=SM90_THREADS,
        shared_bytes=_sm90_shared_bytes(options, tile),
        options=options,
        definitions=wgmma(number, tile.block_n),
        cluster=tile.cluster,
        arch=ARCH,
    )
    num_tiles = _num_tiles(dbias, tile.block_m, tile.cluster * tile.block_n)
    return kernel, tile, tile.cluster * _num_blocks(problem, options, num_tiles, chip.multiprocessors // tile.cluster)


def backward_dbias(
    problem: Problem, options: Options, number: str, chip: Chip, dbias: Operand, *, by_mma: bool
) -> tuple[Kernel, int]:
    """The kernel for arrays of any strides and a bias of any shape, and the number of its blocks.

    That on mma.sync is the faster one, on chips of compute capability 8.0 and newer. In float32 it is only for an lse
    of such products: the last bits of those by wmma differ, and then weights do not add up to 1.
    """
    dims, size = padded_head_dims(problem), NUMBERS[number][2]
    has_mma_sync = chip.capability >= (8, 0) and (size == 2 or by_mma)
    tiles: tuple[Tile, ...] = _sm80_tiles(size, dims, chip) if has_mma_sync else WMMA_TILES[size, dims[0]]
    needed = {tile: _shared_bytes(size, options, dims, tile) for tile in tiles if options.allows_tile(*tile[:2])}
    tile = next((tile for tile in needed if needed[tile] <= chip.shared_memory), None)
    if tile is None:
        least = min(needed.values())
        raise NotImplementedError(f"the gradient of a bias: {chip.name} has less than {least} bytes of shared memory")
    family = "sm80" if has_mma_sync else "wmma"
    header = f"bwd_{family}_dbias"
    name, short, _ = mma_number(number, dims) if has_mma_sync else NUMBERS[number]
    kernel = Kernel(
        template=f"Bwd{family.capitalize()}Dbias",
        header=header,
        symbol="_".join(("cuflash", header, short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, *tile),
        pointers=(*BACKWARD_INPUTS, f"{ELEMENTS[dbias.dtype]}* dbias"),
        params="DbiasParams",
        num_threads=32 * tile.warps,
        shared_bytes=needed[tile],
        options=options,
    )
    num_tiles = _num_tiles(dbias, tile.block_m, tile.block_n)
    if not has_mma_sync or 1 in dbias.shape[2:]:  # then pairs of one tile share a row or a column
        return kernel, num_tiles
    return kernel, _num_blocks(problem, options, num_tiles, num_places(kernel, chip))


def _sm80_tiles(size: int, dims: tuple[int, int], chip: Chip) -> tuple[Sm80Tile, ...]:
    tiles = SM80_TILES[size]
    reached = max(kib for kib in tiles if kib * 1024 <= chip.shared_memory)
    return tuple(tile for tile in tiles[reached] if all(dim % tile.panel == 0 for dim in dims))


def _shared_bytes(size: int, options: Options, dims: tuple[int, int], tile: Tile) -> int:
    block_m, block_n = tile[:2]
    pairs, sums = options.tile_bytes(block_m, block_n), 4 * block_m * (block_n + 1)
    if isinstance(tile, WmmaTile):
        row = pitch(dims[0], size) + pitch(dims[1], size)
        return max(tile.stages * ((block_m + block_n) * row + 8 * block_m + pairs), sums)
    stage = 2 * size * tile.panel * (block_m + block_n) + 8 * block_m
    ahead = 1 + (tile.stages - 2) // (max(dims) // tile.panel)
    return max(tile.stages * stage + max(pairs, 16) + TILE_BYTES * (ahead + 2) + WALK_BYTES, sums)


def _num_tiles(dbias: Operand, block_m: int, block_n: int) -> int:
    """The tiles of the gradient (attention/bias_walk.cuh)."""
    batch, heads, rows, cols = dbias.shape
    return batch * heads * ceil_div(rows, block_m) * ceil_div(cols, block_n)


def _num_blocks(problem: Problem, options: Options, num_tiles: int, places: int) -> int:
    """Blocks stay for one tile after the other, but for few that differ in length: new blocks come as others end."""
    uneven = problem.window != FULL or "block_mask" in options.names
    if num_tiles < places * (MIN_TILES if uneven else 1):
        return num_tiles
    # Of an odd number, lest each always have the same few columns.
    return places - (places + 1) % 2 if uneven else places
