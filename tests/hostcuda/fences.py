"""Fences around allocated arrays: the fast flavour's cheap look for stores past their ends.

Without them such a store breaks the memory of this process, which then dies much later, or does not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.hostcuda.errors import HostCudaError

WIDTH = 1 << 16  # bytes: wrong strides miss by whole rows
NAN_BYTE = 0xFF


class Fenced(np.ndarray[Any, Any]):
    """The memory behind an array, with its fences."""


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Allocate an array full of 0xff between two fences."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.full(size + 2 * WIDTH, NAN_BYTE, np.uint8).view(Fenced)
    return memory[WIDTH : WIDTH + size].view(np.ndarray).view(dtype).reshape(shape)


def check(array: np.ndarray[Any, Any], what: str) -> None:
    """Raise an error if the array was allocated here and a fence was written to."""
    memory = _fenced(array)
    if memory is None:
        return
    for fence, side in ((memory[:WIDTH], "before"), (memory[-WIDTH:], "after")):
        if (fence != NAN_BYTE).any():
            raise HostCudaError(f"{what}: the kernel wrote to memory {side} the array")


def _fenced(array: np.ndarray[Any, Any]) -> Fenced | None:
    found, base = None, array.base
    while isinstance(base, np.ndarray):
        found, base = (base if isinstance(base, Fenced) else found), base.base
    return found
