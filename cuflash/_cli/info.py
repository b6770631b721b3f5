"""``python -m cuflash info``: what this machine can run, and what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cuflash
from cuflash._cli import families
from cuflash._cli.driver import find_driver, version_text
from cuflash._device import Chip
from cuflash._jit.compiler import nvrtc_version
from cuflash._jit.headers import cuda_include_directories
from cuflash._jit.sources import cuda_src, sources_digest
from cuflash._launch import FAMILIES

Facts = dict[str, Any]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info",
        help="what this machine can run, and what is missing",
        description="Tell what this machine can run, and what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else describe(facts))
    return 0


def collect() -> Facts:
    """All facts. What cannot be had is ``{"missing": why}``, with ``"remedy"`` where a command helps."""
    driver = find_driver()
    return {
        "cuflash": {
            "version": cuflash.__version__,
            "path": str(Path(cuflash.__file__).parent),
            "cuda_src": _attempt(lambda: str(cuda_src())),
            "sources_digest": _attempt(sources_digest),
        },
        "python": f"{platform.python_version()} ({sys.executable})",
        "numpy": np.__version__,
        "driver": {"version": driver.version, "cuda": driver.cuda} if driver else _no_driver(),
        "ml_dtypes": _attempt(_ml_dtypes, remedy="pip install ml_dtypes"),
        "cupy": _attempt(_cupy, remedy=_pip_command()),
        "nvrtc": _attempt(lambda: ".".join(map(str, nvrtc_version())), remedy=_pip_command()),
        "headers": _attempt(_headers),
        "cache": _cache(),
        "gpus": _attempt(_gpus),
        "kernels": _kernels_by_capability(),
    }


def describe(facts: Facts) -> str:
    """The facts as text."""
    library = facts["cuflash"]
    lines = [
        _line("cuflash", f"{library['version']} in {library['path']}"),
        _line("CUDA sources", library["cuda_src"]),
        _line("Python", facts["python"]),
        _line("NumPy", facts["numpy"]),
        _line("ml_dtypes", facts["ml_dtypes"], lambda it: f"{it}, for bfloat16"),
        _line(
            "driver",
            facts["driver"],
            lambda it: f"{it['version'] or 'version unknown'}, for CUDA up to {it['cuda']}",
        ),
        _line("CuPy", facts["cupy"], lambda it: f"{it['version']}, CUDA runtime {it['runtime']}"),
        _line("NVRTC", facts["nvrtc"]),
        _line("CUDA headers", facts["headers"], ", ".join),
        _line("kernel cache", facts["cache"], _describe_cache),
    ]
    if _is_missing(facts["gpus"]):
        lines += [_line("GPU", facts["gpus"]), "", "Kernels, by the compute capability of a GPU:"]
        for row in facts["kernels"]:
            lines.append(f"  {row['family']:<8}{row['dtype']:<10}{' '.join(row['runs_on'])}")
            lines += [f"{'':<20}not {arch}: {reason}" for arch, reason in row["why_not"].items()]
        lines += ["", "Attention works on NumPy arrays here; on CuPy arrays it needs what is missing above."]
        return "\n".join(lines)
    for gpu in facts["gpus"]:
        lines += [_line(f"GPU {gpu['id']}", gpu, _describe_gpu)]
        for row in gpu["kernels"]:
            lines.append(f"  {row['family']:<8}{row['dtype']:<10}{row['why_not'] or 'runs'}")
    missing = [name for name in ("cupy", "nvrtc", "headers") if _is_missing(facts[name])]
    verdict = f"needs what is missing above ({', '.join(missing)})" if missing else "is ready"
    lines += ["", f"Attention works on NumPy arrays here; on CuPy arrays it {verdict}."]
    return "\n".join(lines)


def _attempt(fact: Callable[[], Any], remedy: str | None = None) -> Any:
    try:
        return fact()
    except Exception as error:  # whatever is wrong here is what the user wants to be told
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        missing = {"missing": first_line.removeprefix("cuflash: ")}
        return {**missing, "remedy": remedy} if remedy else missing


def _no_driver() -> Facts:
    return {"missing": "no NVIDIA driver was found", "remedy": "install the NVIDIA driver of your system"}


def _pip_command() -> str:
    """For a clone, as README has it: the extra that fits the driver; that for CUDA 12 runs with newer ones too."""
    driver = find_driver()
    major = "13" if driver and int(driver.cuda.partition(".")[0]) >= 13 else "12"
    return f'pip install ".[cuda{major}x]" in a clone of cuflash'


def _ml_dtypes() -> str:
    import ml_dtypes

    return str(ml_dtypes.__version__)


def _cupy() -> Facts:
    import cupy

    return {
        "version": cupy.__version__,
        "runtime": version_text(cupy.cuda.runtime.runtimeGetVersion()),
        "tf32": os.environ.get("CUPY_TF32") == "1",
    }


def _headers() -> list[str]:
    major, _ = nvrtc_version()
    return [str(directory) for directory in cuda_include_directories(major)]


def _cache() -> Facts:
    """Where CuPy keeps compiled kernels, by the rules of its documentation."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return {"directory": None, "writable": True}
    directory = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return {"directory": str(directory), "writable": existing.is_dir() and os.access(existing, os.W_OK)}


def _gpus() -> list[Facts]:
    import cupy

    return [_gpu(number) for number in range(cupy.cuda.runtime.getDeviceCount())]


def _gpu(number: int) -> Facts:
    import cupy

    from cuflash._cupy import backend_on

    chip: Chip = backend_on(number).device.chip
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    return {
        "id": number,
        "name": chip.name,
        "compute_capability": "{}.{}".format(*chip.capability),
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "shared_memory_bytes": chip.shared_memory,
        "l2_cache_bytes": properties["l2CacheSize"],
        "kernels": [
            {"family": family, "dtype": dtype, "why_not": why_not}
            for dtype in families.DTYPES
            for family, why_not in families.obstacles(dtype, chip).items()
        ],
    }


def _kernels_by_capability() -> list[Facts]:
    """For each family and dtype the compute capabilities it runs on, and why not on the others."""
    rows = []
    for dtype in families.DTYPES:
        by_chip = {chip.arch: families.obstacles(dtype, chip) for chip in families.known_chips()}
        for family in FAMILIES:
            runs_on = [arch for arch, reasons in by_chip.items() if reasons[family] is None]
            why_not = {arch: reasons[family] for arch, reasons in by_chip.items() if reasons[family]}
            rows.append({"family": family, "dtype": dtype, "runs_on": runs_on, "why_not": why_not})
    return rows


def _is_missing(fact: Any) -> bool:
    return isinstance(fact, dict) and "missing" in fact


def _line(label: str, fact: Any, text: Callable[[Any], str] = str) -> str:
    if not _is_missing(fact):
        return f"{label:<14}{text(fact)}"
    remedy = f"\n{'':<14}try: {fact['remedy']}" if "remedy" in fact else ""
    return f"{label:<14}missing: {fact['missing']}{remedy}"


def _describe_cache(cache: Facts) -> str:
    if cache["directory"] is None:
        return "in memory (CUPY_CACHE_IN_MEMORY=1)"
    if cache["writable"]:
        return str(cache["directory"])
    return f"{cache['directory']}, which cannot be written: set CUPY_CACHE_DIR to a directory that can"


def _describe_gpu(gpu: Facts) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
        f"L2 cache {gpu['l2_cache_bytes'] / 2**20:.0f} MiB, "
        f"shared memory {gpu['shared_memory_bytes'] // 1024} KiB a block"
    )
