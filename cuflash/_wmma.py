"""The wmma family: portable tensor-core kernels, forward and backward, with their tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _dbias
from ._call import Call, Run
from ._device import Array, Chip
from ._features import ELEMENTS
from ._kernel import BACKWARD_INPUTS, NUMBERS, Kernel, num_key_jobs, num_query_jobs, padded_head_dims, pitch
from ._options import PLAIN, Options
from ._problem import Operand, Problem, ceil_div

Tile = tuple[int, ...]

# The oldest GPU whose tensor cores multiply numbers of each type.
MIN_CAPABILITY = {"float16": (7, 0), "bfloat16": (8, 0), "float32": (8, 0), "tfloat32": (8, 0)}

# Tiles by (bytes of an element, head_dim), the fastest first; the first that fits the chip's shared memory is taken.
# sm_75 has 64 KB and must find one for 2-byte elements, with the tiles of a bias and a mask beside; sm_86, 89 and 120
# have 99 KB and must for all elements. Measured on an H200, and chosen so that no chip spills registers
# (docs/notes/wmma.md): a third number of a key is the major compute capability of the chips that try these tiles
# first.
Tiles = dict[tuple[int, ...], list[Tile]]

# Forward: (block_m, block_n, warps).
FORWARD_TILES: Tiles = {
    (2, 32): [(128, 64, 4), (64, 32, 4)],
    (2, 64): [(128, 64, 4), (64, 32, 4)],
    (2, 96): [(128, 64, 4), (64, 64, 4), (64, 32, 4)],
    (2, 128): [(128, 48, 4), (128, 32, 4), (64, 64, 4), (64, 32, 4)],
    (2, 128, 7): [(64, 64, 4)],
    (2, 128, 9): [(128, 64, 4)],
    (2, 192): [(64, 64, 4), (64, 32, 4), (64, 16, 4)],
    (2, 256): [(64, 64, 4), (64, 32, 4), (64, 16, 4)],
    (4, 32): [(64, 32, 4)],
    (4, 64): [(64, 32, 4)],
    (4, 96): [(64, 32, 4)],
    (4, 128): [(64, 32, 4)],
    (4, 192): [(64, 32, 4), (64, 16, 4)],
    (4, 256): [(64, 16, 4), (32, 16, 2)],
}
# Gradients of K and V: (block_m, block_n, warps over keys, warps over columns, stages).
DKDV_TILES: Tiles = {
    (2, 32): [(64, 64, 4, 1, 2), (32, 64, 4, 1, 1)],
    (2, 64): [(64, 64, 2, 2, 2), (64, 64, 2, 2, 1), (32, 64, 2, 2, 1)],
    (2, 96): [(64, 64, 2, 2, 2), (32, 64, 2, 2, 1)],
    (2, 128): [(64, 128, 4, 2, 2), (64, 64, 2, 2, 2), (32, 64, 2, 2, 1), (32, 32, 2, 2, 1)],
    (2, 192): [(64, 64, 2, 4, 1), (32, 32, 2, 2, 1), (16, 32, 2, 2, 1)],
    (2, 256): [(64, 64, 2, 4, 1), (32, 32, 2, 2, 1), (16, 32, 2, 2, 1)],
    (4, 32): [(32, 64, 4, 1, 1)],
    (4, 64): [(32, 64, 4, 1, 1)],
    (4, 96): [(32, 32, 2, 2, 1)],
    (4, 128): [(32, 32, 2, 2, 1)],
    (4, 192): [(32, 32, 2, 2, 1), (16, 32, 2, 2, 1)],
    (4, 256): [(32, 32, 2, 4, 1), (16, 16, 1, 4, 1)],
}
# Gradient of Q: (block_m, block_n, warps over queries, warps over columns, stages).
DQ_TILES: Tiles = {
    (2, 32): [(64, 64, 4, 1, 2), (64, 32, 4, 1, 1)],
    (2, 64): [(128, 32, 4, 1, 2), (64, 64, 4, 1, 1), (64, 32, 4, 1, 1)],
    (2, 96): [(128, 32, 4, 1, 1), (64, 32, 4, 1, 1)],
    (2, 128): [(128, 32, 4, 1, 2), (64, 32, 4, 1, 1), (32, 32, 2, 1, 1)],
    (2, 192): [(64, 32, 4, 1, 2), (64, 32, 4, 1, 1), (32, 32, 2, 1, 1)],
    (2, 256): [(64, 32, 4, 1, 1), (32, 16, 2, 1, 1)],
    (4, 32): [(64, 32, 4, 1, 1)],
    (4, 64): [(64, 32, 4, 1, 1)],
    (4, 96): [(64, 32, 4, 1, 1), (32, 32, 2, 1, 1)],
    (4, 128): [(32, 32, 2, 1, 1)],
    (4, 192): [(32, 16, 2, 1, 1)],
    (4, 256): [(32, 32, 2, 2, 1), (16, 16, 1, 2, 1)],
}
DELTA_ROWS, DELTA_WARPS = 64, 4
SINKS_WARPS = 16

# A lane learns the layout of fragments from 16 x 16 indices in rows of 24 floats (FragmentMap).
MAP_SCRATCH_BYTES = 16 * 24 * 4


def why_not(
    problem: Problem, number: str, chip: Chip, options: Options = PLAIN, operands: Mapping[str, Operand] | None = None
) -> str | None:
    """The reason why the family cannot compute the problem on a GPU, or None if it can."""
    needed = MIN_CAPABILITY[number]
    if chip.capability < needed:
        return (
            f"{problem.dtype} needs tensor cores of compute capability {needed[0]}.{needed[1]} or newer, "
            f"{chip.name} has {chip.capability[0]}.{chip.capability[1]}"
        )
    return None


def _forward_bytes(size: int, options: Options, dim: int, dim_v: int, block_m: int, block_n: int, warps: int) -> int:
    warp_bytes = max(block_m // warps * pitch(block_n, size), MAP_SCRATCH_BYTES)
    tiles = (block_m + block_n) * pitch(dim, size) + block_n * pitch(dim_v, size)
    return tiles + warps * warp_bytes + options.tile_bytes(block_m, block_n)


def _dkdv_bytes(
    size: int,
    options: Options,
    dim: int,
    dim_v: int,
    block_m: int,
    block_n: int,
    warps_n: int,
    warps_d: int,
    stages: int,
) -> int:
    row = pitch(dim, size) + pitch(dim_v, size)
    stage = block_m * (row + 8) + options.tile_bytes(block_m, block_n)
    return block_n * (row + 2 * pitch(block_m, size)) + stages * stage


def _dq_bytes(
    size: int,
    options: Options,
    dim: int,
    dim_v: int,
    block_m: int,
    block_n: int,
    warps_m: int,
    warps_d: int,
    stages: int,
) -> int:
    row = pitch(dim, size) + pitch(dim_v, size)
    stage = block_n * row + options.tile_bytes(block_m, block_n)
    return block_m * (row + pitch(block_n, size) + 8) + stages * stage


def _shared_memory(chip: Chip) -> int:
    """What a tile may take. Volta has more than Turing, but its fragments fill more registers: it gets the same."""
    return min(chip.shared_memory, 64 * 1024) if chip.capability < (8, 0) else chip.shared_memory


@dataclass(frozen=True)
class _TiledKernel:
    """A kernel template; called for a problem, it gives the kernel to launch and the number of its blocks."""

    template: str
    header: str
    tiles: Tiles
    shared_bytes: Callable[..., int]
    num_warps: Callable[[Tile], int]
    num_blocks: Callable[[Problem, Tile], int]
    pointers: tuple[str, ...]
    params: str

    def __call__(self, problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, int]:
        name, short, size = NUMBERS[number]
        dims = padded_head_dims(problem)
        of_this_chip = self.tiles.get((size, dims[0], chip.capability[0]), [])
        needed = {
            tile: self.shared_bytes(size, options, *dims, *tile)
            for tile in [*of_this_chip, *self.tiles[size, dims[0]]]
            if options.allows_tile(*tile[:2])
        }
        tile = next((tile for tile in needed if needed[tile] <= _shared_memory(chip)), None)
        if tile is None:
            raise NotImplementedError(
                f"{self.header}: {chip.name} has less than {min(needed.values())} bytes of shared memory"
            )
        kernel = Kernel(
            template=self.template,
            header=self.header,
            symbol="_".join(("cuflash", self.header, short, f"d{dims[0]}x{dims[1]}", *options.names)),
            arguments=(f"cuflash::{name}", options.type, *dims, *tile),
            pointers=self.pointers,
            params=self.params,
            num_threads=32 * self.num_warps(tile),
            shared_bytes=needed[tile],
            options=options,
        )
        return kernel, self.num_blocks(problem, tile)


def _query_blocks(problem: Problem, tile: Tile) -> int:
    """A block of threads owns as many queries of a head as the first number of its tile says."""
    return num_query_jobs(problem, tile[0])


def _key_blocks(problem: Problem, tile: Tile) -> int:
    """A block of threads owns as many keys of a key/value head as the second number of its tile says."""
    return num_key_jobs(problem, tile[1])


forward = _TiledKernel(
    template="FwdWmma",
    header="fwd_wmma",
    tiles=FORWARD_TILES,
    shared_bytes=_forward_bytes,
    num_warps=lambda tile: tile[2],
    num_blocks=_query_blocks,
    pointers=("const Element* q", "const Element* k", "const Element* v", "Element* out", "float* lse"),
    params="FwdParams",
)
backward_dkdv = _TiledKernel(
    template="BwdWmmaDkDv",
    header="bwd_wmma_dkdv",
    tiles=DKDV_TILES,
    shared_bytes=_dkdv_bytes,
    num_warps=lambda tile: tile[2] * tile[3],
    num_blocks=_key_blocks,
    pointers=(*BACKWARD_INPUTS, "Element* dk", "Element* dv"),
    params="BwdParams",
)
backward_dq = _TiledKernel(
    template="BwdWmmaDq",
    header="bwd_wmma_dq",
    tiles=DQ_TILES,
    shared_bytes=_dq_bytes,
    num_warps=lambda tile: tile[2] * tile[3],
    num_blocks=_query_blocks,
    pointers=(*BACKWARD_INPUTS, "Element* dq"),
    params="BwdParams",
)


def delta(problem: Problem, number: str) -> tuple[Kernel, int]:
    """The kernel that computes delta = rowsum(dout * out) - dlse and clears memory, and the number of its blocks."""
    name, short, _ = NUMBERS[number]
    kernel = Kernel(
        template="BwdDelta",
        header="bwd_delta",
        symbol=f"cuflash_bwd_delta_{short}",
        arguments=(f"cuflash::{name}", DELTA_ROWS, DELTA_WARPS),
        pointers=(
            *("const Element* out", "const Element* dout", "const float* lse", "const float* dlse"),
            *("float4* cleared", "float* delta", "float* lse_log2"),
        ),
        params="BwdParams",
        num_threads=32 * DELTA_WARPS,
        shared_bytes=0,
    )
    rows = ceil_div(problem.seqlen_q, DELTA_ROWS) * problem.num_heads
    return kernel, max(rows if problem.packed else rows * problem.batch, 1)


def dsinks(problem: Problem, options: Options, target: str) -> tuple[Kernel, int]:
    """The kernel that computes the gradient of sinks of this dtype, and the number of its blocks."""
    kernel = Kernel(
        template="BwdSinks",
        header="bwd_sinks",
        symbol="_".join(("cuflash_bwd_sinks", target, *options.names)),
        arguments=(options.type, ELEMENTS[target], SINKS_WARPS),
        pointers=("const float* lse", "const float* delta", "Element* dsinks"),
        params="BwdParams",
        num_threads=32 * SINKS_WARPS,
        shared_bytes=32 * SINKS_WARPS * 4,
        options=options,
    )
    return kernel, problem.num_heads


def why_no_backward(problem: Problem, chip: Chip, options: Options = PLAIN) -> str | None:
    """None: it can compute the gradients of what it can compute."""
    return None


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
    step = call.step(forward(call.problem, call.options, call.number, call.chip))
    null = call.device.null

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        step(q, k, v, out, null if lse is None else lse, options=call.options_argument(extras))

    return run


def plan_backward(call: Call) -> Run:
    """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
    of_call = call.problem, call.options, call.number, call.chip
    delta_operand = operand_of_delta(call.problem)
    dkdv_step = call.step(backward_dkdv(*of_call), delta=delta_operand)
    dq_step = call.step(backward_dq(*of_call), delta=delta_operand)

    def products(arrays: Inputs, _: Workspace, dq: Array, dk: Array, dv: Array, options: tuple[Any, ...]) -> None:
        dkdv_step(*arrays, dk, dv, options=options)
        dq_step(*arrays, dq, options=options)

    return plan_gradients(call, products)


Inputs = tuple[Array, Array, Array, Array, Array, Array]
"""q, k, v, dout, lse and delta."""


class Workspace(NamedTuple):
    """As many floats that are 0 as were asked for, and lse in powers of two, or null."""

    sums: Array
    lse_log2: Array


def operand_of_delta(problem: Problem) -> Operand:
    """The array delta, which has the shape of the lse."""
    batch, batch_stride = (1, 0) if problem.packed else (problem.batch, problem.num_heads * problem.seqlen_q)
    return Operand((batch, problem.num_heads, problem.seqlen_q, 1), (batch_stride, problem.seqlen_q, 1, 0))


def plan_gradients(
    call: Call, products: Callable[..., None], num_sums: int = 0, *, wants_lse_log2: bool = False, by_mma: bool = False
) -> Run:
    """What every family does before and after the gradients of Q, K and V, which `products` computes.

    It is called with the inputs, a workspace with so many sums, a multiple of 4, dq, dk, dv and the options of kernels.
    by_mma tells whether float32 products are those of mma.sync.
    """
    device, problem, operands = call.device, call.problem, call.operands
    delta_operand = operand_of_delta(problem)
    num_rows = max(math.prod(delta_operand.shape), 1)
    delta_step = call.step(delta(problem, call.number), delta=delta_operand)
    dbias_step: Callable[..., None] | None = None
    dsinks_step: Callable[..., None] | None = None
    rows = problem.batch * problem.seqlen_q  # without any there is nothing to sum, and no sequence to look at
    if "dbias" in operands and rows * problem.seqlen_k:
        dbias_step = _dbias.plan(call, delta_operand, by_mma=by_mma)
    if "dsinks" in operands and rows:
        dsinks_step = call.step(dsinks(problem, call.options, operands["dsinks"].dtype), delta=delta_operand)

    def run(
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,
        dq: Array,
        dk: Array,
        dv: Array,
        dlse: Array | None = None,
        dbias: Array | None = None,
        dsinks: Array | None = None,
        **extras: Any,
    ) -> None:
        with device.temporaries():
            workspace = device.empty((num_sums + num_rows * (1 + wants_lse_log2),), "float32")
        delta = workspace[num_sums:]
        lse_log2 = delta[num_rows:] if wants_lse_log2 else device.null
        options = call.options_argument(extras)
        inputs = q, k, v, dout, lse, delta
        delta_step(out, dout, lse, device.null if dlse is None else dlse, workspace, delta, lse_log2)
        products(inputs, Workspace(workspace, lse_log2), dq, dk, dv, options)
        if dbias_step is not None:
            dbias_step(*inputs, dbias, options=options)
        elif dbias is not None:
            dbias[...] = 0
        if dsinks_step is not None:
            dsinks_step(lse, delta, dsinks, options=options)
        elif dsinks is not None:
            dsinks[...] = 0

    return run
