"""Measuring on the CPU: NumPy, wall clock, tracemalloc."""

from __future__ import annotations

import os
import platform
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from cuflash._cli.bench.cells import Cell, Op
from cuflash._cli.bench.machine import dtype_named
from cuflash._cli.bench.timing import Call, wall_clock

Array = Any


class Cpu:
    """The CPU, as a `cuflash._cli.bench.machine.Machine`."""

    kind = "cpu"
    xp = np
    default_dtype = "float32"

    def head(self) -> dict[str, Any]:
        return {
            "device": f"{_cpu_name()} ({os.cpu_count()} cores)",
            "driver": None,
            "cuda": None,
            "cupy": None,
            "numpy": np.__version__,
        }

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Array:
        return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype_named(dtype))

    def matmul(
        self,
        a: Array,
        b: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        dtype: Any = None,
    ) -> Array:
        compute = np.result_type(a, b, np.float32)  # BLAS has no float16
        a, b = a.astype(compute, copy=False), b.astype(compute, copy=False)
        product = (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
        return product.astype(compute if dtype is None else dtype, copy=False)

    def kernels(self, op: Op, cell: Cell) -> list[str]:
        return ["auto"]

    def kernel_name(self, op: Op, cell: Cell, kernel: str) -> str:
        return "numpy"

    def sample(self, call: Call, repeats: int) -> list[float]:
        return wall_clock(call, repeats)

    def sample_host(self, call: Call, repeats: int) -> list[float]:
        return wall_clock(call, repeats)

    def peak_bytes(self, call: Call) -> int:
        tracemalloc.start()
        try:
            result = call()
            kept, peak = tracemalloc.get_traced_memory()
            del result
        finally:
            tracemalloc.stop()
        return peak - kept

    def release(self) -> None:
        """NumPy returns what is unused by itself."""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
