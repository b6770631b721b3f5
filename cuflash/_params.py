"""NumPy mirrors of the structs in cuda_src/cuflash/attention/params.cuh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._problem import Operand, Problem

STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8"), ("col", "i8")], align=True)

PROBLEM = np.dtype(
    [
        *((name, "i4") for name in ("batch", "num_heads", "num_heads_kv", "seqlen_q", "seqlen_k")),
        *((name, "i4") for name in ("head_dim", "head_dim_v", "band_begin", "band_end")),
        ("softmax_scale", "f4"),
    ],
    align=True,
)


def _struct(operands: tuple[str, ...]) -> np.dtype[Any]:
    return np.dtype([*((name, STRIDES) for name in operands), ("problem", PROBLEM)], align=True)


PARAMS = {
    "FwdParams": _struct(("q", "k", "v", "out", "lse")),
    "BwdParams": _struct(("q", "k", "v", "out", "dout", "lse", "dq", "dk", "dv")),
}


def fill(struct: str, problem: Problem, operands: Mapping[str, Operand]) -> np.ndarray[Any, Any]:
    """A structured array of size 1, as CuPy passes it by value; operands that are left out get strides of 0."""
    params = np.zeros(1, PARAMS[struct])
    for name, operand in operands.items():
        params[name] = operand.strides
    for name in PROBLEM.names or ():
        if name not in ("band_begin", "band_end"):
            params["problem"][name] = getattr(problem, name)
    params["problem"]["band_begin"], params["problem"]["band_end"] = problem.band
    return params
