"""HostDevice: the CPU in the place of a GPU."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cuflash._device import Chip, KernelSource, Launch, TensorBox
from tests.hostcuda import build, child, fences, in_process
from tests.hostcuda.build import Flavour
from tests.hostcuda.errors import HostCudaError
from tests.hostcuda.launch import SCHEDULES, LaunchOptions, Schedule, check_argument, pointer_to
from tests.hostcuda.sources import CUDA_SRC

HOST_CHIP = Chip("hostcuda", (8, 0), 227 * 1024)  # Hopper's kernels take longer: tests/test_sm90_on_host.py has one
MAX_THREADS = 1024
_WGMMA = re.compile(r"^template <>\nstruct cuflash::ptx::Wgmma<.*?^};\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class HostDevice:
    """A ``cuflash._device.Device`` that runs the threads of kernels on the CPU, one at a time.

    Parameters
    ----------
    chip : Chip
        The GPU to pretend to be; decides ``__CUDA_ARCH__`` and how much shared memory a block may use.
    flavour : {"fast", "asan", "tsan"}
        ``"asan"`` reports accesses outside of arrays and undefined behaviour, ``"tsan"`` accesses that no
        barrier orders. Both run in a child process.
    schedule : {"forward", "reverse", "greedy", "random"}, seed : int
        In which order threads run between barriers.
    cp_async : {"eager", "lazy"}
        Asynchronous copies happen at once, or not before somebody waits for them.
    fragment_layout : {"scrambled", "pairs"}
        Which lane holds which element of a wmma fragment; see shadow/mma.h.
    strict : bool
        Report also what hardware happens to forgive: one barrier reached from two places, lanes that disagree
        about a wmma load.
    isolated : bool
        Run the fast flavour in a child process too, where a wild store harms nobody.
    timeout : float
        Seconds until a child process is given up.
    cuda_src : Path
        The library's CUDA sources; tests of tests give a changed copy.
    flags : tuple of str
        More compiler flags.
    """

    chip: Chip = HOST_CHIP
    flavour: Flavour = "fast"
    schedule: Schedule = "forward"
    seed: int = 0
    cp_async: Literal["eager", "lazy"] = "eager"
    fragment_layout: Literal["scrambled", "pairs"] = "scrambled"
    strict: bool = True
    isolated: bool = False
    timeout: float = 300.0
    cuda_src: Path = CUDA_SRC
    flags: tuple[str, ...] = ()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """Allocate a C-ordered array whose bytes are all 0xff: what stays unwritten shows as NaN."""
        if self.flavour == "fast":
            return fences.allocate(shape, np.dtype(dtype))
        array = np.empty(shape, dtype)  # without fences: sanitizers see where it ends
        array.reshape(-1).view(np.uint8)[...] = fences.NAN_BYTE
        return array

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pointer(self, array: np.ndarray[Any, Any]) -> int:
        """The address of an array's first element."""
        return pointer_to(array)

    def struct(self, params: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What to pass for a struct, given as a structured array of size 1."""
        return params

    def addresses(self, *arrays: np.ndarray[Any, Any]) -> tuple[int, ...]:
        return tuple(map(self.pointer, arrays))

    def tensor_maps(self, arrays: Sequence[TensorBox], dtype: str) -> bytes:
        """The maps as shadow/cuflash/ptx/tma.cuh reads them: 16 numbers each."""
        numbers = [[address, *shape, *strides, *box, *[0] * 6] for address, shape, strides, box in arrays]
        return np.array(numbers, np.int64).tobytes()

    def counter(self) -> Any:
        """A zero, which kernels leave as they find it."""
        return np.zeros(1, np.uint32)

    def load(self, kernels: Sequence[KernelSource]) -> list[Launch]:
        """Compile kernels, or find them compiled."""
        return [self._load(kernel) for kernel in kernels]

    def _load(self, kernel: KernelSource) -> Launch:
        self._check_resources(kernel)
        kernel = replace(kernel, code=_WGMMA.sub("", kernel.code))  # assembler; the shadow has all widths
        library = _library(kernel, self.flavour, self._arch, self.cuda_src, self.flags)

        def launch(num_blocks: int, arguments: tuple[Any, ...]) -> None:
            if not 0 < num_blocks < 2**31:
                raise HostCudaError(f"invalid configuration: a grid of {num_blocks} blocks")
            if num_blocks % _cluster(kernel) != 0:
                raise HostCudaError(f"invalid configuration: {num_blocks} blocks in clusters of {_cluster(kernel)}")
            for argument in arguments:
                check_argument(argument)
            options = self._options(num_blocks, kernel)
            if self.flavour == "fast" and not self.isolated:
                in_process.launch(library, options, arguments)
            else:
                child.launch(build.runner(self.flavour), library, options, arguments, self.timeout)
            for number, argument in enumerate(arguments):
                if isinstance(argument, np.ndarray):
                    fences.check(argument, f"{kernel.symbol}, argument {number}")

        return launch

    @property
    def null(self) -> int:
        """What to pass for a null pointer."""
        return 0

    @property
    def _arch(self) -> int:
        major, minor = self.chip.capability
        return 100 * major + 10 * minor

    def _check_resources(self, kernel: KernelSource) -> None:
        if not 0 < kernel.num_threads <= MAX_THREADS:
            raise HostCudaError(f"{kernel.symbol}: a block of {kernel.num_threads} threads")
        if _cluster(kernel) * kernel.num_threads > MAX_THREADS:
            raise HostCudaError(f"{kernel.symbol}: the runtime takes {MAX_THREADS} threads of a cluster at most")
        if kernel.shared_bytes > self.chip.shared_memory:
            raise HostCudaError(
                f"{kernel.symbol} wants {kernel.shared_bytes} bytes of shared memory, "
                f"{self.chip.name} has {self.chip.shared_memory}"
            )

    def _options(self, num_blocks: int, kernel: KernelSource) -> LaunchOptions:
        return LaunchOptions(
            num_blocks=num_blocks,
            num_threads=kernel.num_threads,
            shared_bytes=kernel.shared_bytes,
            schedule=SCHEDULES.index(self.schedule),
            lazy_copies=self.cp_async == "lazy",
            strict=self.strict,
            paired_fragments=self.fragment_layout == "pairs",
            arch=self._arch,
            cluster=_cluster(kernel),
            seed=self.seed,
        )


def _cluster(kernel: KernelSource) -> int:
    """The blocks of a cluster, as the kernel's source says."""
    found = re.search(r"__cluster_dims__\((\d+)\)", kernel.code)
    return int(found[1]) if found else 1


@functools.cache
def _library(kernel: KernelSource, flavour: Flavour, arch: int, cuda_src: Path, flags: tuple[str, ...]) -> Path:
    return build.kernel_library(kernel, flavour, arch, cuda_src, flags)
