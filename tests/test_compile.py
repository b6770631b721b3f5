"""Every kernel that a call can reach compiles for every GPU we support, fits it, and uses its tensor cores."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from cuflash import _wmma
from cuflash._kernel import HEAD_DIMS, NUMBERS, Kernel
from cuflash._problem import Band, Problem
from tests import cubin
from tests.cubin import CHIPS

pytest.importorskip("cupy")
pytestmark = pytest.mark.compile

MAKERS = {
    "forward": _wmma.forward,
    "delta": _wmma.delta,
    "dkdv": _wmma.backward_dkdv,
    "dq": _wmma.backward_dq,
}


def problem(head_dim: int, head_dim_v: int) -> Problem:
    return Problem("float16", 1, 1, 1, 64, 64, head_dim, head_dim_v, 1.0, Band(-64, 64))


def reachable(arch: int) -> Iterator[Kernel]:
    chip = CHIPS[arch]
    for number in NUMBERS:
        if _wmma.why_not(problem(1, 1), number, chip) is not None:
            continue
        for dims in HEAD_DIMS:
            for make in MAKERS.values():
                yield make(problem(*dims), number, chip)[0]


def cases() -> list[object]:
    unique = {(kernel.symbol, arch): (kernel, arch) for arch in CHIPS for kernel in reachable(arch)}
    return [pytest.param(kernel, arch, id=f"{symbol}-sm_{arch}") for (symbol, _), (kernel, arch) in unique.items()]


# All 255 registers are taken here, and ptxas parks one or two values, whatever the tile (docs/notes/wmma.md).
MAY_PARK_16_BYTES = {
    "cuflash_bwd_wmma_dq_f32_d256x256": {80, 86, 89, 100, 120},
    "cuflash_fwd_wmma_f32_d256x256": {86, 89},
    "cuflash_bwd_wmma_dq_bf16_d128x128": {100},
}


@pytest.mark.parametrize("kernel, arch", cases())
def test_a_kernel_compiles_without_spills_and_uses_tensor_cores(kernel: Kernel, arch: int) -> None:
    if arch not in cubin.supported_archs():
        pytest.skip(f"this NVRTC knows no sm_{arch}")
    code, log = cubin.compile_for(kernel.source, f"sm_{arch}")

    (spills,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    allowed = 16 if arch in MAY_PARK_16_BYTES.get(kernel.symbol, ()) else 0
    assert max(map(int, spills)) <= allowed, log
    if arch == 70:
        return  # the disassembler knows no sm_70 any more
    # A module of two kernels once came out corrupt; the disassembler refuses such a cubin (DESIGN 5.1).
    found = cubin.opcodes(code)
    assert found["EXIT"] > 0
    assert allowed or not {"LDL", "STL"} & set(found)
    if kernel.template != "BwdDelta":
        assert found["HMMA"] > 0
        if "f16" in kernel.symbol:
            assert found["LDSM"] > 0, "factors must come from shared memory by ldmatrix, not word by word"


@pytest.mark.parametrize("arch", CHIPS)
def test_every_tile_fits_the_shared_memory(arch: int) -> None:
    for kernel in reachable(arch):
        assert kernel.shared_bytes <= CHIPS[arch].shared_memory, kernel.symbol


def test_the_source_is_checked_against_what_python_believes() -> None:
    """A wrong size of the parameters or of shared memory does not compile."""
    kernel = _wmma.forward(problem(64, 64), "float16", CHIPS[80])[0]
    source = kernel.source
    for right in (f"kSharedBytes == {kernel.shared_bytes}", "sizeof(cuflash::FwdParams) == "):
        assert right in source.code
        wrong = type(source)(source.symbol, source.code.replace(right, right + "1"), source.num_threads, 0)
        with pytest.raises(cubin.CompileError, match="static assert"):
            cubin.compile_for(wrong, "sm_80")


def test_two_kernels_never_share_a_module() -> None:
    for kernel in reachable(90):
        assert kernel.source.code.count("__global__") == 1


def test_a_spill_would_be_seen() -> None:
    """The patterns above do match: a kernel with more live values than registers shows them."""
    source = _wmma.forward(problem(64, 64), "float16", CHIPS[80])[0].source
    limited = re.sub(r"__launch_bounds__\(\d+, \d+\)", "__launch_bounds__(128, 16)", source.code)
    code, log = cubin.compile_for(type(source)(source.symbol, limited, source.num_threads, 0), "sm_80")
    assert not re.search(r"\b0 bytes spill stores", log)
    assert cubin.opcodes(code)["STL"] > 0
