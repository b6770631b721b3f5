"""Finding the CUDA headers that kernels include: cuda_fp16.h, mma.h and crt/mma.h."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# mma.h includes crt/mma.h, which lies in another wheel.
NEEDED = ("cuda_fp16.h", "cuda_bf16.h", "mma.h", "crt/mma.h")

_WHEELS = {
    12: ("nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12"),
    13: ("nvidia-cuda-runtime", "nvidia-cuda-crt"),
}
_WHEEL_DIRECTORIES = {
    12: ("cuda_runtime/include", "cuda_nvcc/include"),
    13: ("cu13/include",),
}
# Those of the same major version first.
_SYSTEM_DIRECTORIES = ("/usr/local/cuda-{major}/include", "/usr/local/cuda/include", "/usr/include")


def _candidates(cuda_major: int) -> Iterator[tuple[Path, ...]]:
    """Sets of directories that together may hold the headers, the best first."""
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    # All roots together: of two wheels that belong together, one may be the user's and one the system's.
    yield tuple(Path(root) / name for root in roots for name in _WHEEL_DIRECTORIES.get(cuda_major, ()))
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield (Path(os.environ[variable]) / "include",)
    for directory in _SYSTEM_DIRECTORIES:
        yield (Path(directory.format(major=cuda_major)),)


@cache
def cuda_include_directories(cuda_major: int) -> tuple[Path, ...]:
    """The include directories of a CUDA version, from NVIDIA's wheels, CUDA_PATH or the system.

    Raises
    ------
    RuntimeError
        If the headers are nowhere; the message says what to install.
    """
    for directories in _candidates(cuda_major):
        if all(any((d / header).is_file() for d in directories) for header in NEEDED):
            return directories
    wheels = _WHEELS.get(cuda_major, _WHEELS[13])
    raise RuntimeError(
        f"cuflash: the CUDA {cuda_major} headers {', '.join(NEEDED)} were not found. Install them with "
        f"`pip install {' '.join(wheels)}` (in a clone of cuflash: `pip install '.[cuda{cuda_major}x]'`), "
        f"or set CUDA_PATH to a CUDA toolkit."
    )
