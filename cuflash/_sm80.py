"""The sm80 family: FlashAttention-2 by mma.sync, for Ampere and everything since, with its tiles (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from . import _parts, _wmma
from ._call import Call, Run
from ._device import Array, Chip
from ._features import ELEMENTS
from ._kernel import HEAD_DIMS, NUMBERS, Kernel, padded_head_dims
from ._options import PLAIN, Options
from ._problem import FULL, Operand, Problem, ceil_div
from ._wmma import BACKWARD_INPUTS, Inputs, num_bias_tiles, num_jobs, operand_of_delta, plan_gradients

CAPABILITY = (8, 0)
WORK_BYTES, DKDV_WORK_BYTES, DQ_WORK_BYTES = 240, 80, 224  # what a block knows of its job
DBIAS_TILE_BYTES, DBIAS_WALK_BYTES = 24, 100  # of a tile of pairs, and of the way through them
MIN_SCALE = float(np.finfo(np.float32).tiny)  # less is 0 for kernels, and maxima of products are not those of scores


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
    """Queries of a block of threads, keys of a step, warps, stages of K and V."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class DbiasTile(NamedTuple):
    """Rows and columns of a block's gradient, warps, those that share their rows, columns of a panel, stages."""

    block_m: int
    block_n: int
    warps: int
    splits: int
    panel: int
    stages: int


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
    (192, 192, 227): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), SMALLEST),
    (256, 256, 99): (Tile(64, 64, 4, 1), SMALLEST),
    (256, 256, 163): (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), SMALLEST),
    (256, 256, 227): (Tile(64, 64, 4, 1), SMALLEST),  # two blocks of 4 warps beat one of 8
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
MOST_HUNGRY = {"bias", "mask", "mod", "dropout"}
FRUGAL_TILES: dict[tuple[int, int], dict[Tile, set[str]]] = {
    (64, 64): {Tile(128, 64, 4, 2): MOST_HUNGRY},
    (128, 128): {Tile(128, 48, 4, 2): {"softcap", "alibi", "bias", "mask", "mod"}, Tile(128, 32, 4, 2): MOST_HUNGRY},
}
FLOAT32_FRUGAL_TILES = {(64, 64): {Tile(128, 32, 4, 1): MOST_HUNGRY | {"softcap", "alibi"}}}
# What calls with so few queries take first: memory decides, and copies have two stages.
SHORT_TILES = {(64, 64): Tile(64, 128, 4, 2), (128, 128): Tile(64, 64, 4, 2)}

# The head_dims, padded, of the float32 calls that kernel="auto" gives to this family: of those with gradients (below)
# the ones that were measured to be faster than with wmma: 1.6 to 2.1 times on an H200 (docs/notes/sm80.md).
FLOAT32_IN_AUTO = frozenset({32, 64, 96, 128})

# Of float32, by two kernels, up to 128 columns: a warp would not hold more of dK and dV.
FLOAT32_DKDV_TILES: Tiles = {
    # 32 keys a warp up to 64 columns, then 16. As long as memory allows: barriers are few.
    (32, 32, 99): (DkDvTile(64, 128, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (64, 64, 99): (DkDvTile(32, 128, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (64, 64, 163): (DkDvTile(64, 128, 4, 1, 4, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (96, 96, 99): (DkDvTile(32, 64, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
    (128, 128, 99): (DkDvTile(16, 64, 4, 1, 1, 1),),
    (128, 128, 163): (DkDvTile(32, 64, 4, 1, 2, 1), DkDvTile(16, 64, 4, 1, 1, 1)),
}
FLOAT32_DQ_TILES: Tiles = {
    # 32 queries a warp up to 64 columns; more do not fit the memory.
    (32, 32, 99): (DqTile(128, 32, 4, 1), DqTile(64, 16, 4, 1)),
    (64, 64, 99): (DqTile(128, 32, 4, 1), DqTile(64, 16, 4, 1)),
    (96, 96, 99): (DqTile(64, 32, 4, 1), DqTile(64, 16, 4, 1)),
    (128, 128, 99): (DqTile(64, 32, 4, 1), DqTile(64, 16, 4, 1)),
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
DQ_FRUGAL_TILES = {(128, 128): {DqTile(64, 64, 4, 1): {"dropout"}}}
# Gradient of a bias, for all head dimensions that are whole panels. What counts is how often Q, dO, K and V come from
# L2: 128 x 128 makes 64 operations of a byte, 128 x 64 makes 43. 8 warps, since two of them hide what one waits for.
DBIAS_TILES_OF_CHIPS = {
    # Tensor cores that are slow enough for 43. With two stages there is room for a float32 bias and a mask as well.
    99: (DbiasTile(128, 64, 8, 2, 32, 3), DbiasTile(128, 64, 8, 2, 32, 2)),
    # Two stages of 64 columns would want 1 KiB more than there is.
    163: (DbiasTile(128, 128, 8, 2, 32, 3), DbiasTile(128, 128, 8, 2, 32, 2)),
    # With 64 columns there are half the barriers. The other one is for D 32 and 96.
    227: (DbiasTile(128, 128, 8, 2, 64, 2), DbiasTile(128, 128, 8, 2, 32, 3)),
}
DBIAS_MIN_TILES = 32  # that blocks stay for, if the tiles differ in length: then those of each make up for it
DBIAS_TILES: Tiles = {
    (*dims, kib): tuple(tile for tile in tiles if all(dim % tile.panel == 0 for dim in dims))
    for dims in HEAD_DIMS
    for kib, tiles in DBIAS_TILES_OF_CHIPS.items()
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
    if problem.softmax_scale < MIN_SCALE:
        return f"it takes scales from {MIN_SCALE:.3g}, not {problem.softmax_scale}"
    kernels = (forward, backward, backward_dkdv, backward_dq) if _size(problem) == 2 else (forward,)
    if any(kernel.tile(problem, options, chip) is None for kernel in kernels):
        return f"{chip.name} has too little shared memory for a tile with {', '.join(options.arguments)}"
    return None


def is_slower_than_wmma(problem: Problem) -> bool:
    """Whether kernel="auto" asks wmma first."""
    return problem.dtype == "float32" and padded_head_dims(problem)[0] not in FLOAT32_IN_AUTO


def _size(problem: Problem) -> int:
    """Bytes of an element."""
    return 4 if problem.dtype == "float32" else 2


def _forward_bytes(size: int, dims: tuple[int, int], tile: Tile, options: Options) -> int:
    """Tiles of Q, K and V, of arrays of pairs, hidden pairs, and careful rows (attention/careful_row.cuh)."""
    pairs, careful = options.tile_bytes(*tile[:2]), options.tile_bytes(1, 32)
    stage = size * tile.block_n * sum(dims) + max(pairs, 16)
    hidden = 8 * tile.block_m * ceil_div(tile.block_n, 64) if "block_mask" in options.names else 16
    work = WORK_BYTES + ceil_div(max(options.dtype.itemsize, 1), 16) * 16
    return size * tile.block_m * dims[0] + tile.stages * stage + hidden + tile.warps * max(careful, 16) + work


def _dkdv_bytes(size: int, dims: tuple[int, int], tile: DkDvTile, options: Options) -> int:
    stage = size * tile.block_m * sum(dims) + 8 * tile.block_m + max(options.tile_bytes(*tile[:2]), 16)
    pairs, nothing = size * tile.block_n * tile.block_m, size * 16 * 32
    weights, dscores = (pairs if shared else nothing for shared in (tile.splits > 1, tile.splits > 1 or tile.adds_dq))
    tiles = size * tile.block_n * sum(dims) + weights + dscores + tile.stages * stage
    return tiles + _careful_bytes(tile.warps, options) + DKDV_WORK_BYTES


def _dq_bytes(size: int, dims: tuple[int, int], tile: DqTile, options: Options) -> int:
    stage = size * tile.block_n * sum(dims) + max(options.tile_bytes(*tile[:2]), 16)
    return size * tile.block_m * sum(dims) + tile.stages * stage + _careful_bytes(tile.warps, options) + DQ_WORK_BYTES


def _dbias_bytes(size: int, dims: tuple[int, int], tile: DbiasTile, options: Options) -> int:
    stage = 2 * size * tile.panel * (tile.block_m + tile.block_n) + 8 * tile.block_m
    ahead = 1 + (tile.stages - 2) // (max(dims) // tile.panel)
    work = DBIAS_TILE_BYTES * (ahead + 2) + DBIAS_WALK_BYTES
    sums = 4 * tile.block_m * (tile.block_n + 1)
    return max(tile.stages * stage + max(options.tile_bytes(*tile[:2]), 16) + work, sums)


def _careful_bytes(warps: int, options: Options) -> int:
    """Of attention/careful_gradients.cuh."""
    return warps * max(options.tile_bytes(16, 16), 16)


def tile_class(tiles: Tiles, problem: Problem, chip: Chip) -> tuple[int, int, int]:
    """The entry of a table for a problem on a chip."""
    dims = padded_head_dims(problem)
    classes = [kib for *of_dims, kib in tiles if tuple(of_dims) == dims]
    return (*dims, max((kib for kib in classes if kib * 1024 <= chip.shared_memory), default=min(classes)))


@dataclass(frozen=True)
class _TiledKernel:
    """A kernel template; called for a problem, it gives the kernel to launch and the number of its blocks."""

    template: str
    header: str
    tiles: Mapping[int, Tiles]  # by the size of elements
    shared_bytes: Callable[[int, tuple[int, int], Any, Options], int]
    num_blocks: Callable[[Problem, Any], int]
    pointers: tuple[str, ...]
    params: str
    frugal_tiles: Mapping[int, dict[tuple[int, int], dict[Any, set[str]]]] = field(default_factory=dict)
    short_tiles: Mapping[int, dict[tuple[int, int], Any]] = field(default_factory=dict)
    change: Callable[[Any], Any] = lambda tile: tile
    name: str = ""  # if not that of the header
    more_arguments: tuple[str, ...] = ()

    def tile(self, problem: Problem, options: Options, chip: Chip) -> Any:
        """The tile that suits a call, or None if none fits the shared memory."""
        size, dims = _size(problem), padded_head_dims(problem)
        tiles = self.tiles[size][tile_class(self.tiles[size], problem, chip)]
        frugal = self.frugal_tiles.get(size, {}).get(dims, {})
        short = self.short_tiles.get(size, {}).get(dims)
        tiles = (*(tile for tile, names in frugal.items() if names & options.names_in_every_tile), *tiles)
        if short and problem.seqlen_q <= short.block_m:
            tiles = (short, *tiles)
        return next(
            (
                tile
                for tile in map(self.change, tiles)
                if options.allows_tile(*tile[:2]) and self.shared_bytes(size, dims, tile, options) <= chip.shared_memory
            ),
            None,
        )

    def __call__(self, problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, int]:
        name, short, _ = NUMBERS[number]
        dims, tile = padded_head_dims(problem), self.tile(problem, options, chip)
        assert tile is not None, "why_not has found one"
        kernel = Kernel(
            template=self.template,
            header=self.header,
            symbol="_".join(("cuflash", self.name or self.header, short, f"d{dims[0]}x{dims[1]}", *options.names)),
            arguments=(f"cuflash::{name}", options.type, *dims, *map(int, tile), *self.more_arguments),
            pointers=self.pointers,
            params=self.params,
            num_threads=32 * tile.warps,
            shared_bytes=self.shared_bytes(_size(problem), dims, tile, options),
            options=options,
        )
        return kernel, self.num_blocks(problem, tile)


def _query_blocks(problem: Problem, tile: Tile | DqTile) -> int:
    return num_jobs(problem, problem.seqlen_q, tile.block_m) * problem.num_heads


def _key_blocks(problem: Problem, tile: DkDvTile) -> int:
    return num_jobs(problem, problem.seqlen_k, tile.block_n) * problem.num_heads_kv


forward = _TiledKernel(
    template="FwdSm80",
    header="fwd_sm80",
    tiles={2: FORWARD_TILES, 4: FLOAT32_FORWARD_TILES},
    shared_bytes=_forward_bytes,
    num_blocks=_query_blocks,
    pointers=("const Element* q", "const Element* k", "const Element* v", "Element* out", "float* lse"),
    params="FwdParams",
    frugal_tiles={2: FRUGAL_TILES, 4: FLOAT32_FRUGAL_TILES},
    short_tiles={2: SHORT_TILES},
)
forward_parts = replace(
    forward,
    name="fwd_sm80_parts",
    pointers=("const Element* q", "const Element* k", "const Element* v", "float* parts", "float* part_lse"),
    more_arguments=("float", "true"),
)
backward_dkdv = _TiledKernel(
    template="BwdSm80DkDv",
    header="bwd_sm80_dkdv",
    tiles={2: DKDV_TILES, 4: FLOAT32_DKDV_TILES},
    shared_bytes=_dkdv_bytes,
    num_blocks=_key_blocks,
    pointers=(*BACKWARD_INPUTS, "Element* dk", "Element* dv", "float* dq_sums"),
    params="BwdParams",
)
backward = replace(backward_dkdv, name="bwd_sm80", change=lambda tile: tile._replace(adds_dq=True))
backward_dq = _TiledKernel(
    template="BwdSm80Dq",
    header="bwd_sm80_dq",
    tiles={2: DQ_TILES, 4: FLOAT32_DQ_TILES},
    frugal_tiles={2: DQ_FRUGAL_TILES},
    shared_bytes=_dq_bytes,
    num_blocks=_query_blocks,
    pointers=(*BACKWARD_INPUTS, "Element* dq"),
    params="BwdParams",
)


def num_places(kernel: Kernel, chip: Chip) -> int:
    """The blocks of threads that a chip runs at the same time: as many as have their registers, and shared memory.

    Kernels take about all of the registers that a thread can have, 255 of 64 K, and the driver 1 KiB of a block's
    shared memory.
    """
    reserved = 1024
    by_memory = (chip.shared_memory + reserved) // (kernel.shared_bytes + reserved)
    return chip.multiprocessors * min(256 // kernel.num_threads, by_memory)


def backward_dbias(problem: Problem, options: Options, number: str, chip: Chip, dbias: Operand) -> tuple[Kernel, int]:
    """The kernel that computes the gradient of a bias of this shape, and the number of its blocks.

    They stay for one tile of the gradient after the other, but for tiles of which pairs share a row or a column, and
    for few tiles that differ in length: then new blocks come as others end.
    """
    make = _TiledKernel(
        template="BwdSm80Dbias",
        header="bwd_sm80_dbias",
        tiles={2: DBIAS_TILES},
        shared_bytes=_dbias_bytes,
        num_blocks=lambda problem, tile: num_bias_tiles(dbias, *tile[:2]),
        pointers=(*BACKWARD_INPUTS, f"{ELEMENTS[dbias.dtype]}* dbias"),
        params="DbiasParams",
    )
    kernel, num_tiles = make(problem, options, number, chip)
    places = num_places(kernel, chip)
    uneven = problem.window != FULL or "block_mask" in options.names
    if 1 in dbias.shape[2:] or num_tiles < places * (DBIAS_MIN_TILES if uneven else 1):
        return kernel, num_tiles
    # Of an odd number, lest each always have the same few columns.
    return kernel, places - (places + 1) % 2 if uneven else places


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
    of_call = call.problem, call.options, call.number, call.chip
    kernel, num_blocks = forward(*of_call)
    tile = forward.tile(call.problem, call.options, call.chip)
    num_parts = _parts.num_parts(
        call.problem, num_blocks, num_places(kernel, call.chip), tile.block_m, _parts.MIN_TILES * tile.block_n
    )
    if num_parts > 1:
        return _parts.plan_forward(call, forward_parts(*of_call), num_parts)
    step, null = call.step((kernel, num_blocks)), call.device.null

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        step(q, k, v, out, null if lse is None else lse, options=call.options_argument(extras))

    return run


def why_no_backward(problem: Problem, chip: Chip, options: Options = PLAIN) -> str | None:
    """The reason why it cannot compute gradients, or None if it can."""
    if problem.dtype != "float32":
        return None
    if max(padded_head_dims(problem)) > 128:
        return f"it computes gradients of float32 up to head_dim 128, not {max(problem.head_dim, problem.head_dim_v)}"
    if any(kernel.tile(problem, options, chip) is None for kernel in (backward_dkdv, backward_dq)):
        return f"{chip.name} has too little shared memory for a tile with {', '.join(options.arguments)}"
    return None


def _rows_of_sums(problem: Problem, tile: DkDvTile) -> int:
    """Queries of a tile of sums of dq: a thread holds at most 64 sums at once."""
    head_dim, _ = padded_head_dims(problem)
    return tile.block_m if tile.block_m * head_dim <= 64 * 32 * tile.warps else tile.block_m // 2


def _blocks_of_sums(problem: Problem, tile: DkDvTile) -> int:
    return num_jobs(problem, problem.seqlen_q, _rows_of_sums(problem, tile)) * problem.num_heads


def finish(problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, int]:
    """The kernel that rounds the sums of dq, and the number of its blocks."""
    name, short, _ = NUMBERS[number]
    dims, tile = padded_head_dims(problem), backward.tile(problem, options, chip)
    kernel = Kernel(
        template="BwdSm80Finish",
        header="bwd_sm80_finish",
        symbol="_".join(("cuflash_bwd_sm80_finish", short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, _rows_of_sums(problem, tile), tile.warps),
        pointers=(*BACKWARD_INPUTS, "Element* dq", "const float* dq_sums"),
        params="BwdParams",
        num_threads=32 * tile.warps,
        shared_bytes=_careful_bytes(tile.warps, options),
        options=options,
    )
    return kernel, _blocks_of_sums(problem, tile)


def plan_backward(call: Call) -> Run:
    """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
    device, problem, delta = call.device, call.problem, operand_of_delta(call.problem)
    of_call = problem, call.options, call.number, call.chip
    if call.deterministic or problem.dtype == "float32":
        dkdv_step, dq_step = (call.step(make(*of_call), delta=delta) for make in (backward_dkdv, backward_dq))

        def apart(inputs: Inputs, dq: Array, dk: Array, dv: Array, options: tuple[Any, ...]) -> None:
            dkdv_step(*inputs, dk, dv, device.null, options=options)
            dq_step(*inputs, dq, options=options)

        return plan_gradients(call, apart, _wmma.backward_dbias if problem.dtype == "float32" else backward_dbias)

    step, finish_step = (call.step(make(*of_call), delta=delta) for make in (backward, finish))
    tile = backward.tile(problem, call.options, call.chip)
    num_sums = _blocks_of_sums(problem, tile) * _rows_of_sums(problem, tile) * padded_head_dims(problem)[0]

    def in_one_pass(inputs: Inputs, dq: Array, dk: Array, dv: Array, options: tuple[Any, ...]) -> None:
        sums = device.zeros((max(num_sums, 1),), "float32")
        step(*inputs, dk, dv, sums, options=options)
        finish_step(*inputs, dq, sums, options=options)

    return plan_gradients(call, in_one_pass, backward_dbias)
