"""Compiling the kernels of the variants before they are measured, in many processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from multiprocessing import get_context

from cuflash._cli.bench.cells import Cell, Op
from cuflash._cli.bench.machine import Machine
from cuflash._cli.bench.variants import PLAIN, VARIANTS, Sizes

MAX_PROCESSES = 16  # each has a CUDA context, which takes memory of the GPU
FEW = Sizes(width=1024, seqlen=2048, batch=1)  # but rows as long as those that have kernels of their own
CANDIDATES = (PLAIN, replace(PLAIN, causal=True), *VARIANTS)


def compile_variants(ops: Sequence[Op], kernels_of: Callable[[Op, Cell], Iterable[str]], dtype: str) -> None:
    """Call every variant once, with few tokens; the kernels stay in CuPy's cache on disk."""
    jobs = [
        (number, place, op, kernel, dtype)
        for number, variant in enumerate(CANDIDATES)
        for place, cell in enumerate(variant.cells(FEW, dtype))
        for op in ops
        if op in variant.ops
        for kernel in kernels_of(op, cell)
    ]
    workers = min(len(jobs), MAX_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(number: int, place: int, op: Op, kernel: str, dtype: str) -> None:
    variant = CANDIDATES[number]
    with suppress(Exception):  # it will fail once more where it is measured, and be told
        variant.prepare(_gpu(), op, variant.cells(FEW, dtype)[place], kernel)().call()


@cache
def _gpu() -> Machine:
    from cuflash._cli.bench.gpu import Gpu

    return Gpu()
