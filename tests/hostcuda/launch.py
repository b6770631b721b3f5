"""A launch as the runtime takes it: options, and arguments in memory."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, Literal

import numpy as np

Schedule = Literal["forward", "reverse", "greedy", "random"]
SCHEDULES: tuple[Schedule, ...] = ("forward", "reverse", "greedy", "random")


class LaunchOptions(ctypes.Structure):
    """Mirrors hostcuda::Options."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_blocks", "num_threads", "shared_bytes")),
        *((name, ctypes.c_int32) for name in ("schedule", "lazy_copies", "strict", "paired_fragments")),
        *((name, ctypes.c_int32) for name in ("arch", "cluster")),
        ("seed", ctypes.c_uint64),
    ]


def is_value(argument: Any) -> bool:
    """Whether an argument is a struct, passed by value; everything else is a pointer."""
    return isinstance(argument, np.ndarray) and argument.dtype.names is not None


def check_argument(argument: Any) -> None:
    if is_value(argument):
        if argument.size != 1:
            raise TypeError(f"a struct is passed as an array of size 1, not of shape {argument.shape}")
    elif not isinstance(argument, np.ndarray) and not (isinstance(argument, int) and argument == 0):
        kind = type(argument).__name__
        raise TypeError(f"arguments are NumPy arrays, 0 or structs, not {kind} {argument!r}")


def address(array: np.ndarray[Any, Any]) -> int:
    """Where element [0, ..., 0] is; 0 if there is none, as of CuPy's arrays."""
    return int(array.__array_interface__["data"][0]) if array.size else 0


_arrays: weakref.WeakValueDictionary[int, np.ndarray[Any, Any]] = weakref.WeakValueDictionary()


def pointer_to(array: np.ndarray[Any, Any]) -> int:
    """The address of an array for a struct; who finds it there finds the array again, if that still exists."""
    if array.size:
        _arrays[address(array)] = array
    return address(array)


def array_at(place: int) -> np.ndarray[Any, Any] | None:
    """The array of which a struct has the address."""
    return _arrays.get(place)
