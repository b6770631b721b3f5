"""The gradient of a bias, for every family: which of its two kernels computes it, and their tiles (docs/kernels.md)."""

from __future__ import annotations

from typing import NamedTuple

from ._device import Chip
from ._features import ELEMENTS
from ._kernel import BACKWARD_INPUTS, NUMBERS, Kernel, num_places, padded_head_dims, pitch
from ._options import Options
from ._problem import FULL, Operand, Problem, ceil_div

TILE_BYTES, WALK_BYTES = 24, 100  # of a tile of pairs, and of the way through them (attention/bias_tiles.cuh)
MIN_TILES = 32  # that blocks stay for, if the tiles differ in length: then those of each make up for it


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

# By the KiB of shared memory that a block may use, those of the largest class that a chip reaches; for all head
# dimensions that are whole panels. What counts is how often Q, dO, K and V come from L2: 128 x 128 makes 64 operations
# of a byte, 128 x 64 makes 43. 8 warps, since two of them hide what one waits for.
SM80_TILES = {
    # Tensor cores that are slow enough for 43. With two stages there is room for a float32 bias and a mask as well.
    99: (Sm80Tile(128, 64, 8, 2, 32, 3), Sm80Tile(128, 64, 8, 2, 32, 2)),
    # Two stages of 64 columns would want 1 KiB more than there is.
    163: (Sm80Tile(128, 128, 8, 2, 32, 3), Sm80Tile(128, 128, 8, 2, 32, 2)),
    # With 64 columns there are half the barriers. The other one is for D 32 and 96.
    227: (Sm80Tile(128, 128, 8, 2, 64, 2), Sm80Tile(128, 128, 8, 2, 32, 3)),
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


def backward_dbias(problem: Problem, options: Options, number: str, chip: Chip, dbias: Operand) -> tuple[Kernel, int]:
    """The kernel that computes the gradient of a bias of this shape, and the number of its blocks.

    That on mma.sync is the faster one; it takes numbers of 16 bits, and chips of compute capability 8.0 and newer.
    """
    name, short, size = NUMBERS[number]
    dims = padded_head_dims(problem)
    has_mma_sync = size == 2 and chip.capability >= (8, 0)
    tiles: tuple[Tile, ...] = _sm80_tiles(dims, chip) if has_mma_sync else WMMA_TILES[size, dims[0]]
    needed = {tile: _shared_bytes(size, options, dims, tile) for tile in tiles if options.allows_tile(*tile[:2])}
    tile = next((tile for tile in needed if needed[tile] <= chip.shared_memory), None)
    if tile is None:
        least = min(needed.values())
        raise NotImplementedError(f"the gradient of a bias: {chip.name} has less than {least} bytes of shared memory")
    family = "sm80" if has_mma_sync else "wmma"
    header = f"bwd_{family}_dbias"
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
    num_tiles = _num_tiles(dbias, tile)
    if not has_mma_sync or 1 in dbias.shape[2:]:  # then pairs of one tile share a row or a column
        return kernel, num_tiles
    uneven = problem.window != FULL or "block_mask" in options.names
    return kernel, _num_blocks(num_tiles, num_places(kernel, chip), uneven=uneven)


def _sm80_tiles(dims: tuple[int, int], chip: Chip) -> tuple[Sm80Tile, ...]:
    reached = max(kib for kib in SM80_TILES if kib * 1024 <= chip.shared_memory)
    return tuple(tile for tile in SM80_TILES[reached] if all(dim % tile.panel == 0 for dim in dims))


def _shared_bytes(size: int, options: Options, dims: tuple[int, int], tile: Tile) -> int:
    block_m, block_n = tile[:2]
    pairs, sums = options.tile_bytes(block_m, block_n), 4 * block_m * (block_n + 1)
    if isinstance(tile, WmmaTile):
        row = pitch(dims[0], size) + pitch(dims[1], size)
        return max(tile.stages * ((block_m + block_n) * row + 8 * block_m + pairs), sums)
    stage = 2 * size * tile.panel * (block_m + block_n) + 8 * block_m
    ahead = 1 + (tile.stages - 2) // (max(dims) // tile.panel)
    return max(tile.stages * stage + max(pairs, 16) + TILE_BYTES * (ahead + 2) + WALK_BYTES, sums)


def _num_tiles(dbias: Operand, tile: Tile) -> int:
    """The tiles of the gradient (attention/bias_walk.cuh)."""
    batch, heads, rows, cols = dbias.shape
    return batch * heads * ceil_div(rows, tile.block_m) * ceil_div(cols, tile.block_n)


def _num_blocks(num_tiles: int, places: int, *, uneven: bool) -> int:
    """Blocks stay for one tile after the other, but for few that differ in length: new blocks come as others end."""
    if num_tiles < places * (MIN_TILES if uneven else 1):
        return num_tiles
    # Of an odd number, lest each always have the same few columns.
    return places - (places + 1) % 2 if uneven else places
