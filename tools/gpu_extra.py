"""Print the extra that fits the NVIDIA driver here, cuda12x or cuda13x, or nothing where there is none."""

from __future__ import annotations

import ctypes


def gpu_extra() -> str:
    """Ask the driver itself: it has no other dependency, and it knows which CUDA it can run."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    if version.value >= 13000:
        return "cuda13x"
    return "cuda12x" if version.value >= 12000 else ""


if __name__ == "__main__":
    print(gpu_extra())
