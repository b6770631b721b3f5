"""What the launch path asks of a device; CuPy is one, the test suite's CPU emulation is another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = Any
"""An array of the device: ``cupy.ndarray``, or ``numpy.ndarray`` on the emulated device."""

Launch = Callable[[int, tuple[Any, ...]], None]
"""``launch(num_blocks, arguments)``: arrays are passed as pointers, structs by value."""

TensorBox = tuple[int, tuple[int, int, int, int], tuple[int, int, int], tuple[int, int]]
"""Address, shape, strides and box of an array, as `cuflash._driver.tensor_map` takes them."""


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that decide which kernels it can run."""

    name: str
    capability: tuple[int, int]
    shared_memory: int  # bytes one block may use
    multiprocessors: int = 1

    @property
    def arch(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class KernelSource:
    """One kernel, ready to compile: its symbol, the CUDA C++ that defines it, and how it is launched."""

    symbol: str
    code: str
    num_threads: int
    shared_bytes: int
    arch: str = ""  # what to compile it for; if empty, the chip at hand


class Device(Protocol):
    """Where kernels run."""

    @property
    def chip(self) -> Chip: ...

    @property
    def null(self) -> Any:
        """What to pass for a null pointer."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Allocate an uninitialised C-ordered array."""

    def temporaries(self) -> AbstractContextManager[None]:
        """Where arrays are allocated that a run needs for itself: in a captured CUDA graph they are the graph's own."""

    def pointer(self, array: Array) -> int:
        """The address of an array's first element."""

    def addresses(self, *arrays: Array) -> tuple[int, ...]:
        """Those of several arrays."""

    def struct(self, params: np.ndarray[Any, Any]) -> Any:
        """What to pass for a struct, given as a structured array of size 1."""

    def tensor_maps(self, arrays: Sequence[TensorBox], dtype: str) -> bytes:
        """The tensor maps of arrays, one behind the other."""

    def counter(self) -> Any:
        """What to pass for the address of a 0 that the kernel changes back, and that no other uses at the same time."""

    def load(self, kernels: Sequence[KernelSource]) -> list[Launch]:
        """Compile kernels, at the same time, or find them compiled."""
