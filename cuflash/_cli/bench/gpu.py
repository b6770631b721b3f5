"""Measuring on a GPU: CuPy, CUDA events, a cold L2 cache, CuPy's memory hooks."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from cuflash._cli.bench.cells import Cell, Op
from cuflash._cli.bench.machine import dtype_named
from cuflash._cli.bench.timing import Call
from cuflash._cli.driver import find_driver, version_text
from cuflash._cli.families import obstacles, problem_of
from cuflash._cublas import product
from cuflash._cupy import backend_on
from cuflash._device import Device
from cuflash._launch import fastest_first

Array = Any

HOST_LOOP = 200


class Gpu:
    """CuPy's current GPU, as a `cuflash._cli.bench.machine.Machine`."""

    kind = "gpu"
    xp = cupy

    def __init__(self) -> None:
        device = cupy.cuda.Device()
        self.device: Device = backend_on(device.id).device
        self._chip = self.device.chip
        self.default_dtype = "bfloat16" if self._chip.capability >= (8, 0) else "float16"
        # Overwriting four times the L2 cache leaves nothing of the inputs in it, and gives the host the time
        # to enqueue the call before the GPU gets to it.
        l2_cache = cupy.cuda.runtime.getDeviceProperties(device.id)["l2CacheSize"]
        self._flush = cupy.empty(max(4 * l2_cache, 1 << 28), np.uint8)

    def head(self) -> dict[str, Any]:
        driver = find_driver()
        head = {
            "device": self._chip.name,
            "driver": driver.version if driver else None,
            "cuda": version_text(cupy.cuda.runtime.runtimeGetVersion()),
            "cupy": cupy.__version__,
        }
        torch = sys.modules.get("torch")
        if torch is not None:
            head["torch"] = torch.__version__
            head["cudnn"] = torch.backends.cudnn.version()
        return head

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Array:
        return _flat_normal(int(np.prod(shape)), dtype, seed).reshape(shape)

    def matmul(
        self,
        a: Array,
        b: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        dtype: Any = None,
    ) -> Array:
        dtype = np.float32 if dtype is None else dtype
        return product(a, b, transpose_a=transpose_a, transpose_b=transpose_b, dtype=dtype)

    def kernels(self, op: Op, cell: Cell) -> list[str]:
        reasons = obstacles(cell.dtype, self._chip, head_dim=cell.head_dim, backward=op == "backward")
        ordered = fastest_first(problem_of(cell.dtype, cell.head_dim), self._chip)
        return [family for family in ordered if reasons[family] is None] or ["auto"]  # which will say why not

    def kernel_name(self, op: Op, cell: Cell, kernel: str) -> str:
        return self.kernels(op, cell)[0] if kernel == "auto" else kernel

    def sample(self, call: Call, repeats: int) -> list[float]:
        spans = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(repeats)]
        for start, stop in spans:
            self._flush.data.memset_async(0, self._flush.nbytes)
            start.record()
            call()
            stop.record()
        cupy.cuda.get_current_stream().synchronize()
        return [cupy.cuda.get_elapsed_time(start, stop) for start, stop in spans]

    def sample_host(self, call: Call, repeats: int) -> list[float]:
        """Each sample is the mean of a tight loop, short enough for the GPU's queue to take it all."""
        samples = []
        for _ in range(repeats):
            cupy.cuda.get_current_stream().synchronize()
            with _no_garbage_collection():
                start = time.perf_counter()
                for _ in range(HOST_LOOP):
                    call()
                samples.append((time.perf_counter() - start) * 1e3 / HOST_LOOP)
        cupy.cuda.get_current_stream().synchronize()
        return samples

    def peak_bytes(self, call: Call) -> int:
        meter = _PeakMeter()
        with meter:
            result = call()
            extra = meter.peak - meter.live
        cupy.cuda.get_current_stream().synchronize()
        del result
        return extra

    def release(self) -> None:
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.cuda.empty_cache()


class _PeakMeter(cupy.cuda.MemoryHook):  # type: ignore[misc]
    """Bytes that were allocated from CuPy's pool since the meter was entered: now, and at most."""

    name = "cuflash.PeakMeter"

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def malloc_postprocess(self, **event: int) -> None:
        if event["mem_ptr"]:
            self._sizes[event["mem_ptr"]] = event["mem_size"]
            self.live += event["mem_size"]
            self.peak = max(self.peak, self.live)

    def free_postprocess(self, **event: int) -> None:
        self.live -= self._sizes.pop(event["mem_ptr"], 0)  # older blocks do not count


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@lru_cache(maxsize=8)
def _flat_normal(size: int, dtype: str, seed: int) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(size, np.float32)
    return cupy.asarray(numbers).astype(dtype_named(dtype))
