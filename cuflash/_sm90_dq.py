"""The kernel of the sm90 family for dq alone, with its tiles (cuda_src/cuflash/kernels/bwd_sm90_dq.cuh)."""

from __future__ import annotations

from typing import NamedTuple

from ._device import Chip
from ._kernel import NUMBERS, Kernel
from ._options import Options
from ._sm90_block import Tile, shared_bytes
from ._wgmma import ARCH, wgmma

# By head_dim and head_dim_v; the first that fits the shared memory is taken, with arrays of pairs the first that has
# two places for them. What the tile calls Q, K and V are dO, V and K here, and Q comes along with dO. S and dP of 128
# keys, and dQ of 128 columns, fit the 232 registers of a thread; beyond 128 columns it is 64 keys, with arrays of pairs
# 48 rather than 32 (10 % faster at 256 columns). K has at least two places, since the next S is started before dQ has
# read its own.
TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 64): (Tile(128, 128, 2, 3, 3, 2), Tile(128, 128, 2, 2, 2, 2), Tile(128, 64, 2, 2, 2, 2)),
    (128, 128): (Tile(128, 128, 1, 2, 2, 1), Tile(128, 64, 1, 2, 2, 2)),
    (192, 128): (Tile(128, 64, 1, 2, 2, 2), Tile(128, 64, 1, 2, 2, 1)),
    (192, 192): (Tile(128, 64, 1, 2, 2, 1), Tile(128, 32, 1, 2, 2, 1)),
    (256, 256): (Tile(128, 64, 1, 1, 2, 1), Tile(128, 48, 1, 1, 2, 1), Tile(128, 32, 1, 2, 2, 1)),
}


def _shared_bytes(dims: tuple[int, int], tile: Tile, options: Options) -> int:
    return shared_bytes((dims[1], dims[0]), tile, options, dims[0])


class KernelOfTile(NamedTuple):
    """A kernel and its tile."""

    kernel: Kernel
    tile: Tile


def tile(dims: tuple[int, int], options: Options, chip: Chip) -> Tile | None:
    """The tile that suits a call, or None if none fits the shared memory."""
    fitting = [
        tile
        for tile in TILES[dims]
        if options.allows_tile(*tile[:2]) and _shared_bytes(dims, tile, options) <= chip.shared_memory
    ]
    has_pairs = options.tile_bytes(1, 32) > 0
    return next((tile for tile in fitting if tile.stages_pairs > 1 and has_pairs), next(iter(fitting), None))


def kernel(dims: tuple[int, int], options: Options, number: str, chip: Chip) -> KernelOfTile:
    """The kernel for a padded head_dim and head_dim_v."""
    name, short, _ = NUMBERS[number]
    taken = tile(dims, options, chip)
    assert taken is not None, "why_not has found one"
    made = Kernel(
        template="BwdSm90Dq",
        header="bwd_sm90_dq",
        symbol="_".join(("cuflash_bwd_sm90_dq", short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, *taken),
        pointers=(
            *("const float* lse", "const float* delta", "unsigned* spoiled"),
            *("Element* dq", "unsigned* counter"),
        ),
        params="BwdSm90Params",
        num_threads=128 * (1 + taken.block_m // 64),
        shared_bytes=_shared_bytes(dims, taken, options),
        options=options,
        definitions="".join(wgmma(number, width) for width in sorted({taken.block_n, dims[0]})),
        arch=ARCH,
    )
    return KernelOfTile(made, taken)
