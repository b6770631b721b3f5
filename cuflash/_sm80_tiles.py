"""The tiles of the sm80 family, each with its reason (docs/notes/sm80.md has what was tried)."""

from __future__ import annotations

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """Forward: queries of a block, keys of a step, warps, stages of K and V, columns of Q that stay in registers."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    kept_q: int = 0


class DkDvTile(NamedTuple):
    """Queries of a step, keys of a block of threads, warps, those that share their keys, parts, stages of Q and dO.

    A warp takes its queries of a step part by part.
    """

    block_m: int
    block_n: int
    warps: int
    splits: int
    parts: int
    stages: int
    adds_dq: bool = False  # to sums in global memory


class DqTile(NamedTuple):
    """Queries of a block of threads, keys of a step, warps, stages of K and V, warps that share their queries."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int = 1


# By head_dim, head_dim_v, and the KiB of shared memory that a block may use: those of the largest class that a chip
# reaches. The first that suits the call and fits is taken, so further ones are for calls with arrays of pairs.
# A multiprocessor has 64 K registers: two blocks of 4 warps at 255, or one of 8, and shared memory for two of
# 113 KiB (sm_90), 81 (sm_80) or 50 (sm_86, 89, 120).
Tiles = dict[tuple[int, int, int], tuple[Any, ...]]

SMALLEST = Tile(64, 32, 4, 1)  # fits everywhere
FORWARD_TILES: Tiles = {
    # 32 rows a warp: K and V are read from shared memory half as often as with 16.
    (32, 32, 99): (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST),
    (64, 64, 99): (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST),
    # Half the maxima and barriers; for older chips the compiler wants 3 registers more than there are.
    (64, 64, 227): (Tile(128, 128, 4, 1), Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST),
    (96, 96, 99): (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), SMALLEST),
    (96, 96, 163): (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), SMALLEST),
    # Two stages of 64 keys take a few registers too many.
    (128, 128, 99): (Tile(128, 32, 4, 1), SMALLEST),
    (128, 128, 163): (Tile(128, 64, 4, 1), SMALLEST),
    (192, 128, 99): (Tile(64, 64, 4, 1), SMALLEST),
    (192, 128, 163): (Tile(64, 64, 4, 1), SMALLEST),
    (192, 128, 227): (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), SMALLEST),
    # Output of 32 rows would take 192 registers or more: 16 rows a warp.
    (192, 192, 99): (Tile(64, 64, 4, 1), SMALLEST),
    (192, 192, 163): (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), SMALLEST),
    (192, 192, 227): (Tile(128, 64, 8, 2, 192), Tile(128, 64, 8, 1), SMALLEST),  # Q wholly in registers
    (256, 256, 99): (Tile(64, 64, 4, 1), SMALLEST),
    (256, 256, 163): (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), SMALLEST),
    # Two blocks of 4 warps beat one of 8; 13 of 16 factors of Q find room in registers.
    (256, 256, 227): (Tile(64, 64, 4, 1, 208), SMALLEST),
}
# float32: tiles are twice as large, and products of high and low parts take more time than anything else.
FLOAT32_FORWARD_TILES: Tiles = {
    # 32 rows a warp: K and V are read and taken apart half as often as with 16.
    (32, 32, 99): (Tile(128, 64, 4, 2), Tile(64, 32, 4, 1)),
    (64, 64, 99): (Tile(128, 32, 4, 1), Tile(64, 32, 4, 1)),
    # Q is taken apart half as often; sm_80 lacks a register or two.
    (64, 64, 227): (Tile(128, 64, 4, 1), Tile(64, 32, 4, 1)),
    (96, 96, 99): (Tile(128, 32, 4, 1), Tile(64, 32, 4, 1)),
    # Memory for one block, and not the registers for 32 rows of each of its 4 warps on sm_120.
    (128, 128, 99): (Tile(64, 32, 4, 1),),
    # Two blocks of 4 warps; with 32 rows a warp there is memory for one.
    (128, 128, 163): (Tile(64, 32, 4, 1),),
    (128, 128, 227): (Tile(128, 32, 4, 1), Tile(64, 32, 4, 1)),
    # Long rows: 16 a warp, and 8 warps, in one block or two.
    (192, 128, 99): (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
    (192, 128, 163): (Tile(128, 32, 8, 1), Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
    (192, 128, 227): (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
    (192, 192, 99): (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
    (192, 192, 163): (Tile(128, 32, 8, 1), Tile(64, 16, 4, 1)),
    (192, 192, 227): (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
    (256, 256, 99): (Tile(64, 16, 4, 1), Tile(32, 16, 2, 1)),
    (256, 256, 163): (Tile(128, 16, 8, 1), Tile(64, 16, 4, 1)),
    (256, 256, 227): (Tile(128, 32, 8, 1), Tile(64, 16, 4, 1)),
}
# What calls take first if one of these options takes more registers than the first tiles leave.
FrugalTiles = dict[tuple[int, int, int], dict[Any, set[str]]]
FRUGAL_TILES: FrugalTiles = {
    (64, 64, 99): {Tile(128, 64, 4, 2): {"mod"}, Tile(128, 96, 4, 1): {"dropout"}},
    (128, 128, 99): {Tile(128, 48, 4, 2): {"softcap", "alibi", "bias", "mask", "mod"}},
    # The plain tile of 64 keys has registers enough for the other options.
    (128, 128, 163): {Tile(128, 48, 4, 2): {"softcap", "alibi", "mod", "dropout"}},
}
FLOAT32_FRUGAL_TILES: FrugalTiles = {
    (64, 64, 99): {Tile(128, 32, 4, 1): {"softcap", "alibi", "bias", "mask", "mod", "dropout"}}
}
# On sm_90 the first tile parks a dozen words for these, and is 4 to 12 % faster all the same.
PARKED = {(128, 128): {"softcap", "alibi", "dropout"}}
# What calls with so few queries take first: memory decides, and copies have two stages.
SHORT_TILES = {(64, 64): Tile(64, 128, 4, 2), (128, 128): Tile(64, 64, 4, 2)}

# Of float32, by two kernels.
FLOAT32_DKDV_TILES: Tiles = {
    # 32 keys a warp up to 64 columns, then 16. As long as memory allows: barriers are few.
    (32, 32, 99): (DkDvTile(64, 128, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (64, 64, 99): (DkDvTile(32, 128, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (64, 64, 163): (DkDvTile(64, 128, 4, 1, 4, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (96, 96, 99): (DkDvTile(32, 64, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (128, 128, 99): (DkDvTile(16, 64, 4, 1, 1, 1),),
    (128, 128, 163): (DkDvTile(32, 64, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    # A warp would not hold more of dK and dV of 16 keys: two warps have the same ones.
    (192, 128, 99): (DkDvTile(32, 32, 4, 2, 1, 1), DkDvTile(32, 16, 2, 2, 1, 1)),
    (192, 128, 163): (DkDvTile(32, 64, 8, 2, 1, 1), DkDvTile(32, 32, 4, 2, 1, 1), DkDvTile(32, 16, 2, 2, 1, 1)),
    (192, 192, 99): (DkDvTile(32, 16, 2, 2, 1, 1),),
    (192, 192, 163): (DkDvTile(32, 64, 8, 2, 1, 1), DkDvTile(32, 16, 2, 2, 1, 1)),
    (256, 256, 99): (DkDvTile(32, 16, 2, 2, 1, 1),),  # which wants 1.4 KiB more than chips have
    (256, 256, 163): (DkDvTile(32, 32, 4, 2, 1, 1), DkDvTile(32, 16, 2, 2, 1, 1)),
    (256, 256, 227): (DkDvTile(32, 64, 8, 2, 1, 1), DkDvTile(32, 16, 2, 2, 1, 1)),
}
FLOAT32_DQ_TILES: Tiles = {
    # 32 queries a warp up to 64 columns; more do not fit the memory.
    (32, 32, 99): (DqTile(128, 32, 4, 1), DqTile(64, 16, 4, 1)),
    (64, 64, 99): (DqTile(128, 32, 4, 1), DqTile(64, 16, 4, 1)),
    (96, 96, 99): (DqTile(64, 32, 4, 1), DqTile(64, 16, 4, 1)),
    (128, 128, 99): (DqTile(64, 32, 4, 1), DqTile(64, 16, 4, 1)),
    # Memory for few queries: two warps have the same ones.
    (192, 128, 99): (DqTile(32, 32, 4, 1, 2), DqTile(32, 16, 2, 1)),
    (192, 128, 163): (DqTile(64, 32, 8, 1, 2), DqTile(32, 16, 2, 1)),
    (192, 192, 99): (DqTile(32, 32, 2, 1), DqTile(32, 16, 2, 1)),
    (192, 192, 163): (DqTile(64, 32, 8, 1, 2), DqTile(32, 16, 2, 1)),
    (256, 256, 99): (DqTile(32, 16, 2, 1),),
    (256, 256, 163): (DqTile(32, 32, 4, 1, 2), DqTile(32, 16, 2, 1)),
    (256, 256, 227): (DqTile(64, 32, 8, 1, 2), DqTile(32, 16, 2, 1)),
}
# Gradients of K and V. A warp holds its keys' dK and dV, and their scores and gradients of weights of a step.
DKDV_TILES: Tiles = {
    (32, 32, 99): (DkDvTile(64, 128, 4, 1, 1, 2), DkDvTile(32, 64, 4, 1, 1, 1)),
    (32, 32, 227): (DkDvTile(128, 128, 4, 1, 4, 1), DkDvTile(64, 128, 4, 1, 1, 2), DkDvTile(32, 64, 4, 1, 1, 1)),
    # 32 keys a warp: Q and dO are read half as often for dK and dV. Long steps: barriers are few.
    (64, 64, 99): (DkDvTile(32, 128, 4, 1, 1, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (64, 64, 163): (DkDvTile(64, 128, 4, 1, 2, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (64, 64, 227): (DkDvTile(128, 128, 4, 1, 4, 1), DkDvTile(64, 128, 4, 1, 2, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (96, 96, 99): (DkDvTile(64, 64, 4, 1, 1, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (96, 96, 227): (DkDvTile(128, 64, 4, 1, 2, 1), DkDvTile(64, 64, 4, 1, 1, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (128, 128, 99): (DkDvTile(32, 64, 4, 1, 1, 2), DkDvTile(32, 64, 4, 1, 1, 1)),
    (128, 128, 163): (DkDvTile(64, 128, 8, 2, 1, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (128, 128, 227): (DkDvTile(128, 128, 8, 2, 2, 1), DkDvTile(64, 128, 8, 2, 1, 1), DkDvTile(32, 64, 4, 1, 1, 1)),
    (192, 128, 99): (DkDvTile(32, 64, 4, 1, 1, 1),),
    # 384 columns of dK and dV, and more, do not fit the registers of one warp beside its scores.
    (192, 192, 99): (DkDvTile(32, 32, 4, 2, 1, 1),),
    (192, 192, 163): (DkDvTile(64, 64, 8, 2, 1, 1), DkDvTile(32, 32, 4, 2, 1, 1)),
    (192, 192, 227): (DkDvTile(128, 64, 8, 2, 1, 1), DkDvTile(64, 64, 8, 2, 1, 1), DkDvTile(32, 32, 4, 2, 1, 1)),
    (256, 256, 99): (DkDvTile(32, 32, 4, 2, 1, 1),),
    (256, 256, 163): (DkDvTile(64, 64, 8, 4, 1, 1), DkDvTile(32, 32, 4, 2, 1, 1)),
    (256, 256, 227): (DkDvTile(128, 64, 8, 4, 1, 1), DkDvTile(64, 64, 8, 4, 1, 1), DkDvTile(32, 32, 4, 2, 1, 1)),
}
# In one pass, tiles of pairs beside the first tiles leave memory for one block instead of two.
BACKWARD_FRUGAL_TILES: FrugalTiles = {(64, 64, 99): {DkDvTile(64, 128, 4, 1, 2, 1): {"bias", "mask"}}}
# Gradient of Q.
DQ_TILES: Tiles = {
    (32, 32, 99): (DqTile(128, 64, 4, 2), DqTile(64, 32, 4, 1)),
    (64, 64, 99): (DqTile(128, 32, 4, 2), DqTile(64, 32, 4, 1)),
    (96, 96, 99): (DqTile(64, 64, 4, 1), DqTile(64, 32, 4, 1)),
    (128, 128, 99): (DqTile(64, 64, 4, 1), DqTile(64, 32, 4, 1)),
    (128, 128, 227): (DqTile(128, 32, 4, 1), DqTile(64, 32, 4, 1)),
    (192, 128, 99): (DqTile(64, 32, 4, 1),),
    (192, 192, 99): (DqTile(64, 32, 4, 1), DqTile(32, 32, 2, 1)),
    (256, 256, 99): (DqTile(64, 16, 4, 1), DqTile(32, 32, 2, 1)),
    (256, 256, 163): (DqTile(64, 32, 4, 1),),
}
DQ_FRUGAL_TILES: FrugalTiles = {(128, 128, 99): {DqTile(64, 64, 4, 1): {"dropout", "mod"}}}
DQ_PARKED = {(128, 128): {"mod"}}  # two words on sm_90; whether the other tile is faster there was not measured
