"""Runs CUDA kernel source on the CPU: see README.md here."""

from tests.hostcuda.device import HostDevice
from tests.hostcuda.errors import CompileError, HostCudaError

__all__ = ["CompileError", "HostCudaError", "HostDevice"]
