"""Compiling with g++, and keeping the results in tests/hostcuda/build."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cuflash._device import KernelSource
from tests.hostcuda import headers, sources
from tests.hostcuda.errors import CompileError

Flavour = Literal["fast", "asan", "tsan"]

BUILD = sources.HERE / "build"
COMPILER = os.environ.get("CXX", "g++")
MAX_FILES = 3000  # the rings of one version take about 500
MAX_PRELUDES = 2 * 3  # two versions of the three flavours; 30 MB each

# -fno-strict-aliasing: as in CUDA, where a uint4 may copy halves.
# -ffp-contract=off: every flavour and every machine computes the same bits.
COMMON = ("-std=c++17", "-march=native", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")

# Only kernels are instrumented; the runtime is told by a macro which sanitizer watches them. Compiling takes
# longer than running: hence -Og, or -O1 where running takes long too, and lines (-g1) without variables.
INSTRUMENTATION: dict[Flavour, tuple[str, ...]] = {
    "fast": ("-Og",),
    "asan": (
        *("-Og", "-g1", "-fno-omit-frame-pointer"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DHOSTCUDA_ASAN"),
    ),
    "tsan": ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread", "-DHOSTCUDA_TSAN"),
}
RUNTIME: dict[Flavour, tuple[str, ...]] = {
    "fast": ("-O2",),
    "asan": ("-O2", "-DHOSTCUDA_ASAN"),
    "tsan": ("-O2", "-DHOSTCUDA_TSAN"),
}


def kernel_library(
    kernel: KernelSource, flavour: Flavour, arch: int, cuda_src: Path, flags: tuple[str, ...] = ()
) -> Path:
    """The shared library of a kernel and the runtime."""
    code = f"""\
#define __CUDA_ARCH__ {arch}
#line 1 "{kernel.symbol}.cu"
{kernel.code}
HOSTCUDA_EXPORT({kernel.symbol})
"""

    def compile_to(target: Path) -> list[str | Path]:
        source = target.with_suffix(".cu")
        source.write_text(code)
        command = [COMPILER, "-shared", "-fvisibility=hidden", *COMMON, *INSTRUMENTATION[flavour], *flags]
        names = [f"-ffile-prefix-map={cuda_src}=cuda_src", f"-ffile-prefix-map={sources.HERE}=hostcuda"]
        includes = [*_include(_precompiled_prelude(flavour)), *_includes(cuda_src)]
        prelude = ["-include", "hostcuda/prelude.h"]
        objects = _runtime_objects(flavour, flags)
        return [
            *command,
            *names,
            *includes,
            *prelude,
            "-x",
            "c++",
            source,
            "-x",
            "none",
            *objects,
            "-o",
            target,
        ]

    key = (arch, sources.closure_digest(kernel.code, cuda_src), flavour, flags)
    return _cached(f"{kernel.symbol}-{flavour}", ".so", key, compile_to)


@functools.cache
def runner(flavour: Flavour) -> Path:
    """The program that runs a launch in a process of its own."""

    def compile_to(target: Path) -> list[str | Path]:
        source = sources.RUNTIME / "runner.cpp"
        return [COMPILER, *COMMON, *INSTRUMENTATION[flavour], *_includes(), source, "-ldl", "-o", target]

    return _cached(f"runner-{flavour}", "", (flavour,), compile_to)


@functools.cache
def can_instrument(flavour: Flavour) -> bool:
    """Whether the compiler has the libraries of a sanitizer; some systems package them apart."""

    def compile_to(target: Path) -> list[str | Path]:
        source = target.with_suffix(".cpp")
        source.write_text("int main() {}\n")
        return [COMPILER, *INSTRUMENTATION[flavour], source, "-o", target]

    try:
        _cached(f"probe-{flavour}", "", (flavour,), compile_to)
    except CompileError:
        return False
    return True


@functools.cache
def _runtime_objects(flavour: Flavour, flags: tuple[str, ...]) -> tuple[Path, ...]:
    def compile_to(source: Path) -> Callable[[Path], list[str | Path]]:
        return lambda target: [
            *(COMPILER, "-c", "-fvisibility=hidden", *COMMON, *RUNTIME[flavour], *flags, *_includes()),
            *(source, "-o", target),
        ]

    return tuple(
        _cached(f"{source.stem}-{flavour}", ".o", (flavour, flags), compile_to(source))
        for source in sorted(sources.RUNTIME.glob("*.cpp"))
        if source.name != "runner.cpp"
    )


@functools.cache
def _precompiled_prelude(flavour: Flavour) -> Path:
    """The directory of a precompiled hostcuda/prelude.h: NVIDIA's headers take longer than most kernels."""

    def compile_to(target: Path) -> list[str | Path]:
        source = sources.RUNTIME / "prelude.h"
        return [
            *(COMPILER, "-fvisibility=hidden", *COMMON, *INSTRUMENTATION[flavour]),
            *(f"-ffile-prefix-map={sources.HERE}=hostcuda", *_includes()),
            *("-x", "c++-header", source, "-o", target),
        ]

    name = sources.digest(sources.emulation_digest(), _machine(), flavour)
    directory = BUILD / f"prelude-{flavour}-{name}" / "hostcuda"
    target = directory / "prelude.h.gch"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _compile(compile_to, target)
    return directory.parent


def _includes(cuda_src: Path | None = None) -> list[str | Path]:
    paths = [sources.SHADOW, *([cuda_src] if cuda_src else []), sources.HERE, *headers.include_directories()]
    return [part for path in paths for part in _include(path)]


def _include(path: Path) -> tuple[str, Path]:
    return "-I", path


@functools.cache
def _machine() -> str:
    """The compiler and the processor that -march=native means."""
    try:
        command = [COMPILER, "-march=native", "-Q", "--help=target", "--version"]
        target = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"the host ring needs the C++ compiler {COMPILER!r}: {error}") from error
    return sources.digest(target.stdout, COMMON, INSTRUMENTATION, RUNTIME, headers.include_directories())


def _cached(name: str, suffix: str, key: object, compile_to: Callable[[Path], list[str | Path]]) -> Path:
    target = BUILD / f"{name}-{sources.digest(key, sources.emulation_digest(), _machine())}{suffix}"
    try:
        os.utime(target)  # recently used: _prune, here or in another process, takes others first
    except FileNotFoundError:
        BUILD.mkdir(exist_ok=True)
        _compile(compile_to, target)
        _prune()
    return target


def _compile(compile_to: Callable[[Path], list[str | Path]], target: Path) -> None:
    """Compile into a temporary directory, then move: another process may be compiling the same."""
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        temporary = Path(directory, target.name)
        command = [str(part) for part in compile_to(temporary)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise CompileError(f"{target.name} does not compile:\n{result.stderr[-6000:]}")
        temporary.replace(target)


def _prune() -> None:
    files = [path for path in BUILD.iterdir() if path.is_file()]
    for path in _oldest(files, MAX_FILES):
        path.unlink(missing_ok=True)
    for path in _oldest(list(BUILD.glob("prelude-*")), MAX_PRELUDES):
        shutil.rmtree(path, ignore_errors=True)


def _oldest(paths: list[Path], number_kept: int) -> list[Path]:
    if len(paths) <= number_kept:
        return []
    return sorted(paths, key=_last_use)[:-number_kept]


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0
