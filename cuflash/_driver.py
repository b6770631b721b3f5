"""Functions of the CUDA driver that CuPy does not have."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

MAP_BYTES = 128  # of a CUtensorMap
_ALIGNMENT = 64

# Constants of cuda.h: CUtensorMapDataType, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B.
_DTYPES = {"float16": 6, "bfloat16": 9}
_SWIZZLE_128B = 3
_PROMOTION_256B = 3


@cache
def _driver() -> Any:
    """The library that CuPy has loaded."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def stream_id(stream: int) -> int:
    """A number of the stream at this address that no other stream of the process ever has (``cuStreamGetId``)."""
    number = ctypes.c_ulonglong()
    error = _driver().cuStreamGetId(ctypes.c_void_p(stream), ctypes.byref(number))
    if error:
        raise RuntimeError(f"cuflash: the driver does not know the stream {stream:#x}: CUresult {error}")
    return number.value


def tensor_map(address: int, dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """What tells Hopper's copy engine about a 4-D array of 2-byte elements (``cuTensorMapEncodeTiled``).

    It is copied in boxes whose rows of 128 bytes are swizzled.

    Parameters
    ----------
    address : int
        Where the array begins: a multiple of 16.
    dtype : {"float16", "bfloat16"}
        What it holds.
    shape : sequence of 4 int
        Its sizes, innermost first.
    strides : sequence of 3 int
        Of the outer axes, in elements: multiples of 8.
    box : sequence of 2 int
        Columns and rows of a box. What lies outside of the array becomes 0.

    Returns
    -------
    bytes
        All 128.
    """
    memory = np.zeros(MAP_BYTES + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(memory.ctypes.data + start),
        _DTYPES[dtype],
        4,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 4)(*shape),
        (ctypes.c_uint64 * 3)(*(2 * stride for stride in strides)),
        (ctypes.c_uint32 * 4)(*box, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        0,
        _SWIZZLE_128B,
        _PROMOTION_256B,
        0,
    )
    if error:
        raise RuntimeError(
            f"cuflash: the driver cannot map an array at {address:#x} of shape {tuple(shape)}, strides "
            f"{tuple(strides)} (innermost first): CUresult {error}"
        )
    return memory[start : start + MAP_BYTES].tobytes()
