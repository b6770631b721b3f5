"""What all families with kernels do around the gradients of q, k and v: delta, workspace, those of bias and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from . import _dbias
from ._call import Call, Run
from ._device import Array
from ._features import ELEMENTS
from ._kernel import NUMBERS, Kernel
from ._options import Options
from ._problem import Operand, Problem, ceil_div

DELTA_ROWS, DELTA_WARPS = 64, 4
SINKS_WARPS = 16

Inputs = tuple[Array, Array, Array, Array, Array, Array]
"""q, k, v, dout, lse and delta."""


class Workspace(NamedTuple):
    """As many floats that are 0 as were asked for, and lse in powers of two, or null."""

    sums: Array
    lse_log2: Array


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


def operand_of_delta(problem: Problem) -> Operand:
    """The array delta, which has the shape of the lse."""
    batch, batch_stride = (1, 0) if problem.packed else (problem.batch, problem.num_heads * problem.seqlen_q)
    return Operand((batch, problem.num_heads, problem.seqlen_q, 1), (batch_stride, problem.seqlen_q, 1, 0))


def plan_gradients(
    call: Call, products: Callable[..., None], num_sums: int = 0, *, wants_lse_log2: bool = False, by_mma: bool = False
) -> Run:
    """What comes before and after the gradients of Q, K and V, which `products` computes.

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
