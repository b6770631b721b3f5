"""CuPy's GPUs as devices. The only module, with the JIT, that imports CuPy."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import cupy
import numpy as np

from ._device import Array, Chip, KernelSource, Launch
from ._jit.compiler import compile_kernel
from ._launch import LaunchBackend


class CupyDevice:
    """One GPU. All methods want it to be CuPy's current device."""

    def __init__(self, device_id: int) -> None:
        properties = cupy.cuda.runtime.getDeviceProperties(device_id)
        self.chip = Chip(
            name=properties["name"].decode(),
            capability=(properties["major"], properties["minor"]),
            shared_memory=properties["sharedMemPerBlockOptin"],
        )
        self.null = np.uint64(0)
        self._loaded: dict[str, Launch] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return cupy.empty(shape, dtype)

    def pointer(self, array: Array) -> int:
        return int(array.data.ptr)

    def struct(self, params: np.ndarray[Any, Any]) -> Any:
        return params[0]  # CuPy passes a scalar faster than an array of size 1

    def load(self, kernel: KernelSource) -> Launch:
        launch = self._loaded.get(kernel.code)
        if launch is None:
            function = compile_kernel(kernel)
            block, shared_bytes = (kernel.num_threads,), kernel.shared_bytes

            def launch(num_blocks: int, arguments: tuple[Any, ...]) -> None:
                function((num_blocks,), block, arguments, shared_bytes)

            self._loaded[kernel.code] = launch
        return launch


@cache
def backend_on(device_id: int) -> LaunchBackend:
    """The backend for arrays on one GPU; CUPY_TF32=1 asks for TF32 as it does in CuPy."""
    return LaunchBackend(CupyDevice(device_id), tf32=os.environ.get("CUPY_TF32") == "1")


ndarray = cupy.ndarray
current_device_id = cupy.cuda.device.get_device_id
