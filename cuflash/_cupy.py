"""CuPy's GPUs as devices. Beside _cublas.py, the JIT and the command line the only module that imports CuPy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import cupy
import numpy as np

from ._device import Array, Chip, KernelSource, Launch, TensorBox
from ._driver import stream_id, tensor_map
from ._jit.compiler import compile_kernel
from ._launch import LaunchBackend

MAX_STREAMS = 4096


class Counters:
    """Zeros in the memory of a GPU, for kernels that count there and leave a zero behind.

    Kernels that share one never run at the same time: each stream has its own, and so has each captured launch, which
    may be replayed on any stream.
    """

    def __init__(self) -> None:
        self._of_stream: dict[int, Any] = {}
        self._of_default: Any = None
        self._unused: list[Any] = []
        self._memory: list[cupy.ndarray] = []

    def next(self) -> Any:
        """The address of the counter for a launch on the current stream."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream == 0 and self._of_default is not None:  # it can neither be captured nor destroyed
            return self._of_default
        if cupy.cuda.runtime.streamIsCapturing(stream):
            return self._take(in_stock=1)
        number = stream_id(stream)  # the address may come back while the work of a destroyed stream goes on
        counter = self._of_stream.get(number)
        if counter is None:
            if len(self._of_stream) >= MAX_STREAMS:
                self._of_stream.clear()  # what they had is not used again
            counter = self._of_stream[number] = self._take(in_stock=512)
            if stream == 0:
                self._of_default = counter
        return counter

    def _take(self, in_stock: int) -> Any:
        """One more, of at least so many: allocating in the middle of a capture is only allowed in its relaxed mode."""
        if len(self._unused) < in_stock:
            with cupy.cuda.Stream(non_blocking=True) as stream:  # whatever the stream of the caller is about
                zeros = cupy.zeros(1024, cupy.uint32)
                stream.synchronize()
            self._memory.append(zeros)
            self._unused += [np.uint64(zeros.data.ptr + 4 * i) for i in range(zeros.size)]
        return self._unused.pop()


class CupyDevice:
    """One GPU. All methods want it to be CuPy's current device."""

    def __init__(self, device_id: int) -> None:
        properties = cupy.cuda.runtime.getDeviceProperties(device_id)
        self.chip = Chip(
            name=properties["name"].decode(),
            capability=(properties["major"], properties["minor"]),
            shared_memory=properties["sharedMemPerBlockOptin"],
            multiprocessors=properties["multiProcessorCount"],
        )
        self.null = np.uint64(0)
        self._id = device_id
        self._loaded: dict[str, Launch] = {}
        self._counters = Counters()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return cupy.empty(shape, dtype)

    def temporaries(self) -> AbstractContextManager[None]:
        stream = cupy.cuda.get_current_stream().ptr
        if stream == 0 or not cupy.cuda.runtime.streamIsCapturing(stream):
            return nullcontext()
        # CuPy's pool would give the memory to others, to whom every replay would write.
        return cupy.cuda.using_allocator(cupy.cuda.malloc_async)

    def pointer(self, array: Array) -> int:
        return int(array.data.ptr)

    def addresses(self, *arrays: Array) -> tuple[int, ...]:
        return tuple([array.data.ptr for array in arrays])

    def struct(self, params: np.ndarray[Any, Any]) -> Any:
        return params[0]  # CuPy passes a scalar faster than an array of size 1

    def tensor_maps(self, arrays: Sequence[TensorBox], dtype: str) -> bytes:
        return b"".join(tensor_map(address, dtype, shape, strides, box) for address, shape, strides, box in arrays)

    def counter(self) -> Any:
        return self._counters.next()

    def load(self, kernels: Sequence[KernelSource]) -> list[Launch]:
        missing = {kernel.code: kernel for kernel in kernels if kernel.code not in self._loaded}
        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:  # NVRTC works without Python's lock
                self._loaded.update(zip(missing, pool.map(self._compile, missing.values()), strict=True))
        return [self._loaded[kernel.code] for kernel in kernels]

    def _compile(self, kernel: KernelSource) -> Launch:
        with cupy.cuda.Device(self._id):  # each thread has a current device of its own
            function = compile_kernel(kernel)
        block, shared_bytes = (kernel.num_threads,), kernel.shared_bytes

        def launch(num_blocks: int, arguments: tuple[Any, ...]) -> None:
            function((num_blocks,), block, arguments, shared_bytes)

        return launch


@cache
def backend_on(device_id: int) -> LaunchBackend:
    """The backend for arrays on one GPU; CUPY_TF32=1 asks for TF32 as it does in CuPy."""
    return LaunchBackend(CupyDevice(device_id), tf32=os.environ.get("CUPY_TF32") == "1")


ndarray = cupy.ndarray
current_device_id = cupy.cuda.device.get_device_id
