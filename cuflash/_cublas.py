"""Products of stacks of matrices on a GPU, by cuBLAS."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

Array = Any

CUDA_TYPES = {"float16": 2, "bfloat16": 14, "float32": 0, "float64": 1}  # cudaDataType
COMPUTE_32F = 68  # cublasComputeType_t
DEFAULT_ALGORITHM = -1


def product(
    a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False, dtype: Any = np.float32
) -> Array:
    """``a @ b`` of two contiguous stacks of one dtype, by one ``cublasGemmStridedBatchedEx`` that sums in float32.

    `cupy.matmul` of stacks does not take bfloat16 and computes float16 in float32 (CuPy 14.2,
    https://github.com/cupy/cupy/pull/10317): it would be too easy to beat.
    """
    from cupy_backends.cuda.libs import cublas

    rows, inner = (a.shape[-1], a.shape[-2]) if transpose_a else a.shape[-2:]
    columns = b.shape[-2] if transpose_b else b.shape[-1]
    c = cupy.empty((*a.shape[:-2], rows, columns), dtype)
    if c.size == 0 or inner == 0:  # cuBLAS takes no leading dimension of 0
        c.fill(0)
        return c
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    cublas.gemmStridedBatchedEx(  # cuBLAS counts by columns: C^T = B^T A^T
        cupy.cuda.device.get_cublas_handle(),
        int(transpose_b),
        int(transpose_a),
        columns,
        rows,
        inner,
        one.ctypes.data,
        *_matrices(b),
        *_matrices(a),
        zero.ctypes.data,
        *_matrices(c),
        math.prod(a.shape[:-2]),
        COMPUTE_32F,
        DEFAULT_ALGORITHM,
    )
    return c


def _matrices(stack: Array) -> tuple[int, int, int, int]:
    """Pointer, type, leading dimension and stride of a contiguous stack, in cuBLAS's order."""
    return stack.data.ptr, CUDA_TYPES[stack.dtype.name], stack.shape[-1], stack.shape[-2] * stack.shape[-1]
