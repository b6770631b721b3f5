"""The fa1 family: FlashAttention-1 as a kernel, forward only, to be compared with its successor.

Dao et al., 2022, https://arxiv.org/abs/2205.14135, algorithm 1: keys in the outer loop, queries in the inner one, one
block of threads for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _wmma
from ._call import Call, Run
from ._device import Array, Chip
from ._kernel import NUMBERS, Kernel, padded_head_dims, pitch
from ._options import PLAIN, Options
from ._problem import Operand, Problem, ceil_div

# (keys of a tile, warps): each warp has 16 queries. The first that fits the chip's shared memory is taken: each tile of
# keys makes O travel to the chip and back, so many keys come before many queries.
TILES = ((128, 8), (64, 8), (64, 4), (32, 4), (16, 4), (16, 2))


def why_not(
    problem: Problem, number: str, chip: Chip, options: Options = PLAIN, operands: Mapping[str, Operand] | None = None
) -> str | None:
    """The reason why the family cannot compute the problem on a GPU, or None if it can."""
    if options.names:
        return f"it has no {', '.join(options.arguments)}"
    return _wmma.why_not(problem, number, chip)


def why_no_backward(problem: Problem, chip: Chip, options: Options = PLAIN) -> str | None:
    """The reason why the family cannot compute gradients."""
    return "it is a forward pass only; kernel='wmma' has a backward pass, and takes its lse"


def forward(problem: Problem, number: str, chip: Chip) -> tuple[Kernel, int]:
    """The kernel to launch, and the number of its blocks."""
    name, short, size = NUMBERS[number]
    dims = padded_head_dims(problem)
    tile = next(tile for tile in TILES if _shared_bytes(size, *dims, *tile) <= chip.shared_memory)
    kernel = Kernel(
        template="FwdFa1",
        header="fwd_fa1",
        symbol=f"cuflash_fwd_fa1_{short}_d{dims[0]}x{dims[1]}",
        arguments=(f"cuflash::{name}", *dims, *tile),
        pointers=(
            *("const Element* q", "const Element* k", "const Element* v", "Element* out", "float* lse"),
            *("float* acc_o", "float* row_max", "float* row_sum"),
        ),
        params="FwdParams",
        num_threads=32 * tile[1],
        shared_bytes=_shared_bytes(size, *dims, *tile),
    )
    return kernel, problem.batch * problem.num_heads if problem.seqlen_q else 0


def workspaces(problem: Problem, kernel: Kernel) -> tuple[tuple[int, ...], ...]:
    """The shapes of the float32 arrays `acc_o`, `row_max` and `row_sum`, which a launch takes uninitialised."""
    block_m = kernel.num_threads // 2
    heads, rows = problem.batch * problem.num_heads, ceil_div(problem.seqlen_q, block_m) * block_m
    return (heads, rows, padded_head_dims(problem)[1]), (heads, rows), (heads, rows)


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) that computes out and lse."""
    device = call.device
    kernel, num_blocks = forward(call.problem, call.number, call.chip)
    step, shapes = call.step((kernel, num_blocks)), workspaces(call.problem, kernel)

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        with device.temporaries():
            scratch = [device.empty(shape, "float32") for shape in shapes]
        step(q, k, v, out, device.null if lse is None else lse, *scratch)

    return run


def plan_backward(call: Call) -> Run:
    raise NotImplementedError(why_no_backward(call.problem, call.chip))


def _shared_bytes(size: int, dim: int, dim_v: int, block_n: int, warps: int) -> int:
    pitch_k, pitch_v, pitch_p = (pitch(cols, size) for cols in (dim, dim_v, block_n))
    warp_bytes = 16 * pitch_k + max(16 * pitch_p, _wmma.MAP_SCRATCH_BYTES)  # its rows of Q, and its P
    return warps * warp_bytes + block_n * (pitch_k + pitch_v)
