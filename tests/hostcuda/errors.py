"""What every failure of the emulation raises."""

from __future__ import annotations


class HostCudaError(RuntimeError):
    """A kernel could not be compiled or launched, or did something that CUDA does not allow."""


class CompileError(HostCudaError):
    """The source is not C++, or the machine lacks what compiling takes."""
