"""Measure attention by several source trees, in turn and in one process: is a change faster, and by how much?

    git worktree add ../before HEAD~1
    python tools/compare_trees.py ../before . --head-dim 64 128 --seqlen 512 4096 --variant plain softcap

Clocks of a GPU drift by more than most changes bring, and differ from machine to machine, so only numbers of one run
compare. A tree is a directory with `cuflash` and `cuda_src`; what is measured, and how, is as in `cuflash bench`. The
last column tells how far the results are from those of the first tree, as a share of the largest number.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tree:
    """The package of a source tree, under a name of its own, so that each finds its own modules."""

    name: str

    @classmethod
    def load(cls, source: Path, place: Path, name: str) -> Tree:
        shutil.copytree(source / "cuflash", place / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(source / "cuda_src", place / "cuda_src")
        for path in (place / name).rglob("*.py"):
            text = re.sub(r"^(\s*)import cuflash$", rf"\1import {name} as cuflash", path.read_text(), flags=re.M)
            path.write_text(re.sub(r"^(\s*(?:from|import) )cuflash\b", rf"\1{name}", text, flags=re.M))
        sys.path.insert(0, str(place))
        return cls(name)

    def module(self, path: str) -> Any:
        return importlib.import_module(f"{self.name}._cli.bench.{path}")

    def variant(self, name: str) -> Any:
        """The first of this name."""
        variants = self.module("variants")
        known = (variants.PLAIN, *variants.VARIANTS)
        found = next((variant for variant in known if variant.name == name), None)
        if found is None:
            raise SystemExit(f"--variant: {name!r} is none of {', '.join(dict.fromkeys(v.name for v in known))}")
        return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trees", nargs="+", type=Path, metavar="TREE", help="directory with cuflash and cuda_src")
    parser.add_argument("--op", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--seqlen", nargs="+", type=int, default=[4096])
    parser.add_argument("--mask", nargs="+", choices=("full", "causal"), default=["full"])
    parser.add_argument("--variant", nargs="+", default=["plain"], help="names of `cuflash bench --sweep variants`")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--cpu", action="store_true", help="the NumPy backend, in float32")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)  # for a process that only compiles
    return parser.parse_args()


def each_cell(options: argparse.Namespace, tree: Tree) -> Iterator[tuple[str, Any, str]]:
    """What is measured: direction, cell and variant. The mask is that of plain attention; variants have their own."""
    small, cells = options.cpu or options.compile, tree.module("cells")
    for op, head_dim, mask, seqlen, name in product(
        options.op, options.head_dim, options.mask, options.seqlen, options.variant
    ):
        width, batch = (8 * head_dim, 1) if small else (cells.WIDTH, max(1, cells.TOKENS // seqlen))
        sizes = tree.module("variants").Sizes(width, seqlen, batch)
        variant = replace(tree.variant(name), head_dims=(head_dim,))
        if name == "plain":
            variant = replace(variant, causal=mask == "causal")
        if op in variant.ops:
            yield op, variant.cells(sizes, "float32" if options.cpu else options.dtype)[0], name


def compile_ahead(options: argparse.Namespace) -> None:
    """Fill CuPy's cache, each tree and cell in a process of its own."""
    axes = product(options.trees, options.op, options.head_dim, options.mask, options.seqlen, options.variant)
    names = ("--op", "--head-dim", "--mask", "--seqlen", "--variant")

    def run(case: tuple[Any, ...]) -> None:
        tree, *values = case
        chosen = [str(x) for pair in zip(names, values, strict=True) for x in pair]
        command = [sys.executable, __file__, str(tree), *chosen, "--dtype", options.dtype, "--kernel", options.kernel]
        subprocess.run([*command, "--compile"], capture_output=True, check=False)  # what fails here says so later

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, axes))


def distance(results: Any, expected: Any) -> float:
    """The largest difference of two results, as a share of the largest number."""
    if not isinstance(results, tuple):
        results, expected = (results,), (expected,)

    def share(x: Any, y: Any) -> float:
        x, y = (np.asarray(z.get() if hasattr(z, "get") else z, np.float32) for z in (x, y))
        return float(abs(x - y).max() / abs(y).max())

    return max(share(x, y) for x, y in zip(results, expected, strict=True) if x is not None)


def compare(options: argparse.Namespace, trees: list[Tree]) -> None:
    first = trees[0]
    machine = first.module("cpu").Cpu() if options.cpu else first.module("gpu").Gpu()
    cells, timing = first.module("cells"), first.module("timing")
    for op, cell, name in each_cell(options, first):
        contenders = {tree.name: tree.variant(name).prepare(machine, op, cell, options.kernel)() for tree in trees}
        if options.compile:
            for contender in contenders.values():
                contender.call()
            continue
        expected = contenders[first.name].call()
        furthest = max(distance(contender.call(), expected) for contender in contenders.values())
        del expected
        spreads = timing.measure_in_turn(contenders, machine.sample)
        flops = cells.flops(op, cell, first.variant(name).pairs(cell))
        tflops = " ".join(f"{flops / spreads[tree.name].median / 1e9:8.2f}" for tree in trees)
        print(f"{name:12} {op:8} {cell!s:44} {tflops}   {furthest:.1e}", flush=True)


def main() -> None:
    options = parse()
    if not (options.cpu or options.compile):
        compile_ahead(options)
    with tempfile.TemporaryDirectory() as place:
        trees = [
            Tree.load(source, Path(place, str(number)), f"cuflash_{number}")
            for number, source in enumerate(options.trees)
        ]
        if not options.compile:
            print(f"TFLOP/s by {', '.join(str(tree) for tree in options.trees)}")
        compare(options, trees)


if __name__ == "__main__":
    main()
