"""Compiling kernels for any GPU, without one, and looking at the result."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cuflash._device import Chip, KernelSource
from cuflash._jit.compiler import compile_options

# The most shared memory that a block may use (CUDA C++ Programming Guide, technical specifications by capability).
SHARED_KB = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
CHIPS = {arch: Chip(f"sm_{arch}", (arch // 10, arch % 10), kb * 1024) for arch, kb in SHARED_KB.items()}


# "        /*0230*/              @!P0 IMAD.HI.U32 R5, ...": the name in front of the first point.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


class CompileError(Exception):
    """What NVRTC says about a source it refuses."""


def compile_for(kernel: KernelSource, arch: str) -> tuple[bytes, str]:
    """The cubin for a chip, or for what the kernel asks for, and the log with the registers and spills of ptxas."""
    from cupy_backends.cuda.libs import nvrtc

    # What CuPy adds behind our options (docs/design.md, section 5), so that the compiler sees what it sees on a GPU.
    added = ("--device-as-default-execution-space", "-ftz=true", f"-arch={arch}")
    program = nvrtc.createProgram(kernel.code, f"{kernel.symbol}.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*compile_options(kernel.arch), *added, "--ptxas-options=-v"])
        # CuPy takes the last byte of a cubin for the end of a string, and drops it.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(f"{kernel.symbol} for {arch}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def supported_archs() -> frozenset[int]:
    """The architectures that this NVRTC compiles for: CUDA 13 has dropped sm_70."""
    from cupy_backends.cuda.libs import nvrtc

    return frozenset(nvrtc.getSupportedArchs())


@cache
def nvdisasm() -> str | None:
    """The disassembler: from its wheel, or from a CUDA toolkit."""
    wheels = sorted((Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob("*/bin/nvdisasm"))
    toolkit = Path("/usr/local/cuda/bin/nvdisasm")
    found = [*map(str, wheels), shutil.which("nvdisasm"), str(toolkit) if toolkit.exists() else None]
    return next((path for path in found if path), None)


def disassembled(cubin: bytes) -> str:
    """The listing of a cubin."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run([nvdisasm() or "nvdisasm", "-c", path], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise CompileError(f"the cubin does not disassemble: {listing.stderr}")
    return listing.stdout


def opcodes(listing: str) -> Counter[str]:
    """How often each machine instruction occurs, without its modifiers."""
    return Counter(INSTRUCTION.findall(listing))


def predicates_of_clamps(listing: str) -> list[str]:
    """The instructions that clamp a number and tell by a predicate whether it was at its bound, which is not true.

    Compilers for sm_90 (ptxas of CUDA 12.9 and 13.0) make them of ``clamp(x, 0, n) == n``.
    """
    return re.findall(r"VIMNMX\.\S*RELU \w+, (?:PT, )?U?P\d.*", listing)
