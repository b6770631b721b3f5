"""What kernels of sm90 have in common whose jobs are queries (cuda_src/cuflash/attention/forward_block.cuh)."""

from __future__ import annotations

from typing import NamedTuple

from ._options import Options
from ._problem import ceil_div
from ._tensor_maps import PANEL

JOB_BYTES = 36  # attention/sequence.cuh
VISITED_BYTES = 8  # attention/key_blocks.cuh


class Tile(NamedTuple):
    """Rows of a job, keys of a block, and how many tiles of Q, K, V and of arrays of pairs shared memory holds."""

    block_m: int
    block_n: int
    stages_q: int
    stages_k: int
    stages_v: int
    stages_pairs: int = 1


def _row_bytes(cols: int) -> int:
    """Tiles are in panels of 128-byte rows."""
    return 128 * ceil_div(cols, PANEL)


def shared_bytes(dims: tuple[int, int], tile: Tile, options: Options, more_cols: int = 0) -> int:
    """Tiles, with so many columns beside Q, arrays of pairs, rings of barriers and jobs."""
    row, row_v = map(_row_bytes, dims)
    queries = tile.stages_q * tile.block_m * (row + _row_bytes(more_cols))
    keys = tile.block_n * (tile.stages_k * row + tile.stages_v * row_v)
    pairs = tile.stages_pairs * max(options.tile_bytes(*tile[:2]), 16)
    careful = tile.block_m // 16 * max(options.tile_bytes(1, 32), 16)
    stages_of_jobs = tile.stages_q + 2
    stages = tile.stages_q + tile.stages_k + 2 * tile.stages_v + tile.stages_pairs + stages_of_jobs
    rings = 16 * stages + ceil_div(JOB_BYTES * stages_of_jobs, 8) * 8 + VISITED_BYTES * tile.stages_k
    return queries + keys + pairs + careful + rings
