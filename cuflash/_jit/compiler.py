"""Compiling kernels with NVRTC through CuPy, which keeps the results on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .headers import cuda_include_directories
from .sources import cuda_src

if TYPE_CHECKING:
    from .._device import KernelSource


def nvrtc_version() -> tuple[int, int]:
    """The version of NVRTC that CuPy loads.

    Raises
    ------
    RuntimeError
        If NVRTC is not there; the message says what to install.
    """
    from cupy_backends.cuda.libs import nvrtc

    try:
        major, minor = nvrtc.getVersion()
    except Exception as error:  # CuPy raises RuntimeError or ImportError, depending on what is missing
        raise RuntimeError(
            "cuflash: NVRTC, the CUDA run-time compiler, could not be loaded. Install it with "
            "`pip install nvidia-cuda-nvrtc-cu12` (CUDA 12) or `pip install nvidia-cuda-nvrtc` (CUDA 13). "
            f"CuPy says: {error}"
        ) from error
    return major, minor


def compile_options(arch: str = "") -> tuple[str, ...]:
    """The NVRTC options of a kernel; CuPy adds the architecture of the device, which gives way to `arch`."""
    major, _ = nvrtc_version()
    return (
        *([f"-arch={arch}"] if arch else []),
        "-std=c++17",
        f"-I{cuda_src()}",
        *(f"-I{directory}" for directory in cuda_include_directories(major)),
    )


def compile_kernel(kernel: KernelSource) -> Any:
    """Compile a kernel for the current device, or find it in CuPy's cache; returns a ``cupy.cuda.Function``.

    Raises
    ------
    RuntimeError
        If NVRTC or the headers are missing, the cache cannot be written, or the source does not compile.
    """
    import cupy

    try:
        module = cupy.RawModule(code=kernel.code, options=compile_options(kernel.arch))
        raw_kernel = module.get_function(kernel.symbol)
    except OSError as error:
        raise RuntimeError(
            f"cuflash: the compiled kernel could not be kept in CuPy's cache: {error}. "
            "Set CUPY_CACHE_DIR to a directory you can write to, or CUPY_CACHE_IN_MEMORY=1."
        ) from error
    except cupy.cuda.compiler.CompileException as error:
        raise RuntimeError(f"cuflash: the kernel {kernel.symbol} does not compile: {error}") from error
    if kernel.shared_bytes > 0:
        raw_kernel.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return raw_kernel.kernel  # of the current device; without the Python layer of RawKernel
