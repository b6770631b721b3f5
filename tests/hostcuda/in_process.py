"""Launches in this process: the fast way, for kernels that are trusted not to write where they must not."""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

from tests.hostcuda.errors import HostCudaError
from tests.hostcuda.launch import LaunchOptions, address, is_value

_one_launch_at_a_time = threading.Lock()


@functools.cache
def _function(library: Path) -> Any:
    function = ctypes.CDLL(str(library)).hostcuda_launch
    function.restype = ctypes.c_char_p
    return function


def launch(library: Path, options: LaunchOptions, arguments: tuple[Any, ...]) -> None:
    count = len(arguments)
    pointers = (ctypes.c_void_p * count)()  # the values of those arguments that are pointers
    sizes, values = (ctypes.c_size_t * count)(), (ctypes.c_void_p * count)()
    for i, argument in enumerate(arguments):
        if is_value(argument):
            sizes[i], values[i] = argument.nbytes, address(argument)
        else:
            pointers[i] = 0 if isinstance(argument, int) else address(argument)
            size = ctypes.sizeof(ctypes.c_void_p)
            sizes[i], values[i] = size, ctypes.addressof(pointers) + i * size
    with _one_launch_at_a_time:
        error = _function(library)(ctypes.byref(options), count, sizes, values)
        if error is not None:
            raise HostCudaError(error.decode())
