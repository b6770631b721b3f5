"""A kernel: a template of cuda_src with its arguments, and the CUDA C++ that instantiates it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._device import Chip, KernelSource
from ._jit.sources import cuda_digest
from ._options import Options
from ._params import PARAMS
from ._problem import Problem, ceil_div

# What a kernel is built for: the C++ type, a short name for symbols, and the size of an element in bytes.
NUMBERS = {
    "float16": ("Float16", "f16", 2),
    "bfloat16": ("BFloat16", "bf16", 2),
    "float32": ("Float32", "f32", 4),
    "tfloat32": ("TFloat32", "tf32", 4),
}

# Pairs of head_dim and head_dim_v that kernels are built for; others are padded with zeros in shared memory.
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))

BACKWARD_INPUTS = (
    *("const Element* q", "const Element* k", "const Element* v", "const Element* dout"),
    *("const float* lse", "const float* delta"),
)


# Kernels that take maxima of products for those of scores have a scale above 0; what is less is 0 for them.
MIN_SCALE = float(np.finfo(np.float32).tiny)


def padded_head_dims(problem: Problem) -> tuple[int, int]:
    """The first pair of HEAD_DIMS that has room for the problem's."""
    return next((dim, dim_v) for dim, dim_v in HEAD_DIMS if problem.head_dim <= dim and problem.head_dim_v <= dim_v)


def mma_number(number: str, dims: tuple[int, int]) -> tuple[str, str, int]:
    """What NUMBERS says, for products by mma.sync: in float32 sums of few products errors do not average out."""
    name, short, size = NUMBERS[number]
    return ("FullFloat32" if number == "float32" and dims == (32, 32) else name), short, size


def num_query_jobs(problem: Problem, block_m: int) -> int:
    """Blocks of so many queries, of all heads (attention/sequence.cuh, attention/packed.cuh)."""
    return _num_jobs(problem, problem.seqlen_q, block_m) * problem.num_heads


def num_key_jobs(problem: Problem, block_n: int) -> int:
    """Blocks of so many keys, of all key/value heads."""
    return _num_jobs(problem, problem.seqlen_k, block_n) * problem.num_heads_kv


def _num_jobs(problem: Problem, num_rows: int, block: int) -> int:
    if problem.packed:
        return num_rows // block + problem.batch + 1 if num_rows else 0
    return ceil_div(num_rows, block) * problem.batch


def pitch(cols: int, size: int) -> int:
    """Bytes from one row of a tile to the next in shared memory: padded by 16 against bank conflicts."""
    return cols * size + 16


@dataclass(frozen=True)
class Kernel:
    """A kernel template with its arguments, and the block it runs in."""

    template: str
    header: str
    symbol: str
    arguments: tuple[str | int, ...]
    pointers: tuple[str, ...]
    params: str
    num_threads: int
    shared_bytes: int
    options: Options | None = None  # None for a kernel that knows no options
    definitions: str = ""  # C++ that the header declares and this kernel needs
    cluster: int = 1  # blocks that share their inputs
    arch: str = ""  # what the kernel must be compiled for; if empty, the chip at hand

    @property
    def source(self) -> KernelSource:
        """The CUDA C++ that instantiates the kernel; its assertions tie it to what this module believes."""
        arguments = ", ".join(str(argument) for argument in self.arguments)
        names = ", ".join(pointer.split()[-1] for pointer in self.pointers)
        parameters = [*self.pointers, f"const __grid_constant__ cuflash::{self.params} params"]
        options, call = "", "params"
        if self.options is not None:
            options, call = self.options.code, "params, {}"
            if self.options.features:
                options += f"static_assert(sizeof(Options) == {self.options.dtype.itemsize});\n"
                parameters.append("const __grid_constant__ Options options")
                call = "params, options"
        cluster = f" __cluster_dims__({self.cluster})" if self.cluster > 1 else ""
        code = f"""\
// cuda_src {cuda_digest()}
#include <cuflash/kernels/{self.header}.cuh>
{self.definitions}{options}using Kernel = cuflash::{self.template}<{arguments}>;
using Element = Kernel::Element;
static_assert(sizeof(cuflash::{self.params}) == {PARAMS[self.params].itemsize});
static_assert(Kernel::kNumThreads == {self.num_threads} && Kernel::kSharedBytes == {self.shared_bytes});
extern "C" __global__ void{cluster} __launch_bounds__({self.num_threads}, 1)
{self.symbol}({", ".join(parameters)}) {{
  Kernel::run({{{names}}}, {call});
}}
"""
        return KernelSource(self.symbol, code, self.num_threads, self.shared_bytes, self.arch)


def num_places(kernel: Kernel, chip: Chip) -> int:
    """The blocks of threads that a chip runs at the same time: as many as have their registers, and shared memory.

    Kernels take about all of the registers that a thread can have, 255 of 64 K, and the driver 1 KiB of a block's
    shared memory.
    """
    reserved = 1024
    by_memory = (chip.shared_memory + reserved) // (kernel.shared_bytes + reserved)
    return chip.multiprocessors * min(256 // kernel.num_threads, by_memory)


FIND_BLOCKS_WARPS = 8


def find_blocks(options: Options) -> Kernel:
    """The kernel that finds the blocks of a block mask."""
    return Kernel(
        template="FindBlocks",
        header="find_blocks",
        symbol="cuflash_find_blocks",
        arguments=(options.type, FIND_BLOCKS_WARPS),
        pointers=("Element* visible", "Element* full"),
        params="FwdParams",
        num_threads=32 * FIND_BLOCKS_WARPS,
        shared_bytes=0,
        options=options,
    )
