"""NumPy mirrors of what kernels are called with: cuda_src/cuflash/attention/params.cuh, and what Hopper adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._problem import Operand, Problem

STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8"), ("col", "i8")], align=True)

PROBLEM = np.dtype(
    [
        *((name, "i4") for name in ("batch", "num_heads", "num_heads_kv", "seqlen_q", "seqlen_k")),
        *((name, "i4") for name in ("head_dim", "head_dim_v", "window_begin", "window_end", "bottom_right")),
        ("softmax_scale", "f4"),
    ],
    align=True,
)


def _struct(operands: tuple[str, ...], sizes: tuple[str, ...] = ()) -> np.dtype[Any]:
    fields = [*((name, STRIDES) for name in operands), ("problem", PROBLEM), *((name, "i4") for name in sizes)]
    return np.dtype(fields, align=True)


PARAMS = {
    "FwdParams": _struct(("q", "k", "v", "out", "lse")),
    "MergeParams": _struct(("out", "lse", "parts", "part_sums"), ("num_rows", "num_parts")),
    "BwdParams": _struct(("q", "k", "v", "out", "dout", "lse", "dlse", "delta", "dq", "dk", "dv")),
    "DbiasParams": _struct(("q", "k", "v", "dout", "lse", "delta", "dbias"), ("batch", "heads", "rows", "cols")),
}


def _with_maps(struct: str, inputs: tuple[str, ...]) -> np.dtype[Any]:
    """What Hopper kernels take: a struct, the addresses of the inputs, and tensor maps, at a multiple of 64 bytes."""
    fields: list[Any] = [(struct.removesuffix("Params").lower(), PARAMS[struct]), *((name, "u8") for name in inputs)]
    used = np.dtype(fields, align=True).itemsize
    return np.dtype([*fields, ("gap", f"V{-used % 64}"), ("maps", f"V{128 * len(inputs)}")])


PARAMS["FwdSm90Params"] = _with_maps("FwdParams", ("q", "k", "v"))
PARAMS["BwdSm90Params"] = _with_maps("BwdParams", ("q", "k", "v", "dout"))
PARAMS["DbiasSm90Params"] = _with_maps("DbiasParams", ("q", "k", "v", "dout"))


def fill(struct: str, problem: Problem, operands: Mapping[str, Operand]) -> np.ndarray[Any, Any]:
    """A structured array of size 1, as CuPy passes it by value; operands that are left out get strides of 0."""
    params = np.zeros(1, PARAMS[struct])
    for name in PARAMS[struct].names or ():
        if name in operands:
            params[name] = operands[name].strides
    window = problem.window
    sizes = {"window_begin": window.begin, "window_end": window.end, "bottom_right": window.bottom_right}
    for name in PROBLEM.names or ():
        params["problem"][name] = sizes[name] if name in sizes else getattr(problem, name)
    if struct == "DbiasParams":
        params["batch"], params["heads"], params["rows"], params["cols"] = operands["dbias"].shape
    if struct == "MergeParams":
        batch, heads, rows, _ = operands["parts"].shape
        params["num_rows"], params["num_parts"] = batch * problem.num_heads * rows, heads // problem.num_heads
    return params
