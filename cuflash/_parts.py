"""Split-KV: where jobs are too few for the chip, blocks of threads share the keys of a job, and results are merged.

For any family whose forward kernel writes parts (docs/kernels.md).
"""

from __future__ import annotations

from typing import Any

from ._call import Call, Run
from ._device import Array
from ._kernel import NUMBERS, Kernel
from ._problem import Operand, Problem, ceil_div

MIN_TILES = 2
"""The tiles of keys that make a part worth its start, its way through memory and its merge (docs/notes/sm80.md)."""

MERGE_WARPS = 4
COLS = 4  # of a thread that merges, in 16 bytes


def num_parts(problem: Problem, num_jobs: int, num_places: int, block_m: int, min_keys: int) -> int:
    """Into how many parts the keys of each job are cut: 1 where jobs fill the places for blocks on the chip.

    All parts of all jobs should run at the same time, since a block that came later would double the time; so there are
    as many as there are places. A job has `block_m` queries, a part at least `min_keys` keys. Of packed sequences the
    mean length counts: others are known on the device alone.
    """
    width = problem.window.end - problem.window.begin  # of the band: further keys are seen by no query of a job
    length = ceil_div(problem.seqlen_k, max(problem.batch, 1)) if problem.packed else problem.seqlen_k
    return max(1, min(num_places // max(num_jobs, 1), min(length, block_m + width) // min_keys))


def operands(problem: Problem, count: int) -> dict[str, Operand]:
    """The workspace: float32 results of parts, and base and sum of each row, as if parts were so many heads more."""
    heads, rows, cols = count * problem.num_heads, problem.seqlen_q, ceil_div(problem.head_dim_v, COLS) * COLS
    batch, batch_rows = (1, 0) if problem.packed else (problem.batch, heads * rows)
    return {
        "parts": Operand((batch, heads, rows, cols), (batch_rows * cols, rows * cols, cols, 1), "float32"),
        "part_sums": Operand((batch, heads, rows, 2), (2 * batch_rows, 2 * rows, 2, 1), "float32"),
    }


def merge(problem: Problem, number: str) -> tuple[Kernel, int]:
    """The kernel that merges parts, and the number of its blocks."""
    name, short, _ = NUMBERS[number]
    kernel = Kernel(
        template="MergeParts",
        header="merge_parts",
        symbol=f"cuflash_merge_parts_{short}",
        arguments=(f"cuflash::{name}", MERGE_WARPS),
        pointers=("const float* parts", "const float* part_sums", "Element* out", "float* lse"),
        params="MergeParams",
        num_threads=32 * MERGE_WARPS,
        shared_bytes=0,
    )
    batch = 1 if problem.packed else problem.batch
    threads = batch * problem.num_heads * problem.seqlen_q * ceil_div(problem.head_dim_v, COLS)
    return kernel, ceil_div(threads, 32 * MERGE_WARPS)


def plan_forward(call: Call, made: tuple[Kernel, int], count: int) -> Run:
    """A forward in so many parts, by a kernel that writes them and the number of its jobs.

    It takes 4 * `count` bytes of workspace for each number of out, and twice that for each of lse. Jobs times `count`
    are not more than the places on the chip, so that is at most a float32 tile of out for each place, whatever the
    lengths are.
    """
    kernel, num_jobs = made
    workspace, device = operands(call.problem, count), call.device
    step = call.step((kernel, count * num_jobs), out=workspace["parts"], lse=workspace["part_sums"])
    merge_step = call.step(merge(call.problem, call.number), **workspace)

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        with device.temporaries():
            parts, part_sums = (device.empty(operand.shape, operand.dtype) for operand in workspace.values())
        step(q, k, v, parts, part_sums, options=call.options_argument(extras))
        merge_step(parts, part_sums, out, device.null if lse is None else lse)

    return run
