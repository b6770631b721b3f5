"""The NVIDIA driver, asked without CuPy."""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Driver(NamedTuple):
    """A driver: its version ("580.159.04", if it can be had) and the newest CUDA it runs ("13.0")."""

    version: str | None
    cuda: str


def find_driver() -> Driver | None:
    """The driver of this machine, or None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    cuda = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(cuda))
    return Driver(_version_from_nvml(), version_text(cuda.value))


def _version_from_nvml() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    version = ctypes.create_string_buffer(80)
    nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlShutdown()
    return version.value.decode() or None


def version_text(version: int) -> str:
    """CUDA's number for a version as people write it: 12090 is "12.9"."""
    return f"{version // 1000}.{version % 1000 // 10}"
