"""Compiling the kernels of the variants before they are measured, in many processes: NVRTC has one thread in each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import product
from multiprocessing import get_context

from cuflash._cli.bench.cells import Op
from cuflash._cli.bench.machine import Machine
from cuflash._cli.bench.variants import PLAIN, SIZES, VARIANTS

MAX_PROCESSES = 16  # each has a CUDA context, which takes memory of the GPU


def compile_variants(ops: Sequence[Op], kernels: Sequence[str], dtype: str) -> None:
    """Call every variant once, with few tokens; the kernels stay in CuPy's cache on disk."""
    candidates = (PLAIN, *VARIANTS)
    jobs = [
        (number, head_dim, ops, kernel, dtype)
        for number, variant in enumerate(candidates)
        for head_dim, kernel in product(variant.head_dims, kernels)
    ]
    workers = min(len(jobs), MAX_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(number: int, head_dim: int, ops: Sequence[Op], kernel: str, dtype: str) -> None:
    variant = (PLAIN, *VARIANTS)[number]
    cell = next(cell for cell in variant.cells(SIZES["cpu"], dtype) if cell.head_dim == head_dim)
    for op in set(ops) & set(variant.ops):
        with suppress(Exception):  # it will fail once more where it is measured, and be told
            variant.prepare(_gpu(), op, cell, kernel)().call()


@cache
def _gpu() -> Machine:
    from cuflash._cli.bench.gpu import Gpu

    return Gpu()
