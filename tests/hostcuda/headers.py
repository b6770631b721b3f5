"""Where NVIDIA's headers are: wheels of the running Python first, then a CUDA toolkit."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from tests.hostcuda.errors import CompileError

NEEDED = ("cuda_fp16.h", "crt/host_defines.h")


def _candidates() -> Iterator[Path]:
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        yield from sorted(Path(root).glob("*/include"))
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if variable in os.environ:
            yield Path(os.environ[variable], "include")
    yield Path("/usr/local/cuda/include")


@functools.cache
def include_directories() -> tuple[Path, ...]:
    """The directories of the headers that the emulation needs, in which each comes from one place."""
    candidates = list(_candidates())
    found = []
    for header in NEEDED:
        directory = next((path for path in candidates if (path / header).is_file()), None)
        if directory is None:
            raise CompileError(
                f"<{header}> not found; install nvidia-cuda-runtime-cu12 and nvidia-cuda-nvcc-cu12, "
                "or set CUDA_PATH to a CUDA toolkit"
            )
        found.append(directory)
    return tuple(dict.fromkeys(found))
