"""Every plain kernel compiles for every GPU we support, fits it, and uses its tensor cores; each option for some."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest

from cuflash import _dbias, _gradients, _parts, _sm80, _sm80_tiles, _sm90, _sm90_backward, _sm90_dq, _wgmma, _wmma
from cuflash._device import KernelSource
from cuflash._kernel import HEAD_DIMS, NUMBERS, Kernel, find_blocks
from cuflash._options import Options
from cuflash._problem import Mod, Operand, Problem, Window
from cuflash._wgmma import wgmma
from tests import cubin
from tests.cubin import CHIPS

pytest.importorskip("cupy")
pytestmark = pytest.mark.compile

PAIRS = Operand((1, 1, 64, 64), (0, 0, 64, 1), "bfloat16")
MASK = PAIRS._replace(dtype="bool")
HALF = ("float16", "bfloat16")
ROWS = Operand((1, 1, 1, 1), (0, 0, 0, 0), "float32")
SCORE_MOD = Mod(score_mod="score + table(h, abs(q_idx - kv_idx))", args=(("table", ("float32", 2)),))
MASK_MOD = Mod(mask_mod="q_idx / 64 == kv_idx / 64")

# What each option adds to a problem, and its arrays.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Operand]]] = {
    "softcap": ({"softcap": 50.0}, {}),
    "alibi": ({}, {"alibi_slopes": ROWS}),
    "bias": ({}, {"bias": PAIRS}),
    "mask": ({}, {"mask": MASK}),
    "score_mod": ({"mod": SCORE_MOD}, {}),
    "mask_mod": ({"mod": MASK_MOD}, {"block_mask": ROWS}),
    "sinks": ({}, {"sinks": ROWS}),
    "dropout": ({"dropout_p": 0.1}, {}),
    "packed": ({"packed": True}, {}),
}


def problem(head_dim: int, head_dim_v: int) -> Problem:
    return Problem("bfloat16", 1, 1, 1, 64, 64, head_dim, head_dim_v, 1.0)


def numbers(arch: int) -> list[str]:
    """The types of numbers that the tensor cores of a GPU multiply."""
    return [number for number in NUMBERS if _wmma.why_not(problem(1, 1), number, CHIPS[arch]) is None]


def options(feature: str) -> Options:
    changes, operands = FEATURES[feature]
    return Options.of(replace(problem(1, 1), **changes), operands)


def sm90_forward(options: Options, number: str, head_dims: tuple[int, int], *, causal: bool = False) -> Kernel:
    changed = replace(problem(*head_dims), window=Window.of(causal, None), packed="packed" in options.names)
    return _sm90.forward(changed, options, number, CHIPS[90])[0]


def sm90_backward(
    options: Options, number: str, head_dims: tuple[int, int], *, deterministic: bool = False
) -> tuple[Kernel, ...]:
    """The main kernel and the one that comes last, and the one for dq if they do without it."""
    long = replace(problem(*head_dims), seqlen_q=4096, seqlen_k=4096)
    long = replace(long, packed="packed" in options.names)
    made = _sm90_backward.kernels(long, options, number, CHIPS[90], deterministic=deterministic)
    return made.main, made.finish, *(() if made.of_dq is None else (made.of_dq.kernel,))


def passes(options: Options, number: str, head_dims: tuple[int, int], arch: int) -> Iterator[Kernel]:
    """The forward and the two kernels of the backward."""
    for make in (_wmma.forward, _wmma.backward_dkdv, _wmma.backward_dq):
        yield make(problem(*head_dims), options, number, CHIPS[arch])[0]


SM80_PASSES = (_sm80.forward, _sm80.forward_parts, _sm80.backward, _sm80.finish, _sm80.backward_dkdv, _sm80.backward_dq)


def sm80_passes(options: Options, number: str, head_dims: tuple[int, int], arch: int) -> Iterator[Kernel]:
    """The forward, whole and in parts, the backward in one pass with its end, and the two kernels of the other one."""
    for make in SM80_PASSES:
        yield make(problem(*head_dims), options, number, CHIPS[arch])[0]
    if head_dims in _sm80_tiles.SHORT_TILES:  # that above is for few queries
        yield _sm80.forward(replace(problem(*head_dims), seqlen_q=4096), options, number, CHIPS[arch])[0]


def sm80_float32_passes(number: str, head_dims: tuple[int, int], arch: int) -> Iterator[Kernel]:
    """The forward, whole and in parts, and the two kernels of the backward."""
    of_float32 = replace(problem(*head_dims), dtype="float32")
    has_gradients = _sm80.why_no_backward(of_float32, CHIPS[arch]) is None
    gradients = (_sm80.backward_dkdv, _sm80.backward_dq) if has_gradients else ()
    for make in (_sm80.forward, _sm80.forward_parts, *gradients):
        yield make(of_float32, Options(), number, CHIPS[arch])[0]


def plain_kernels(arch: int) -> Iterator[Kernel]:
    for number in numbers(arch):
        yield _gradients.delta(problem(1, 1), number)[0]
        for head_dims in HEAD_DIMS:
            yield from passes(Options(), number, head_dims, arch)
    if arch >= 80:
        for number in NUMBERS:
            yield _parts.merge(problem(1, 1), number)[0]
        for number, head_dims in product(HALF, HEAD_DIMS):
            yield from sm80_passes(Options(), number, head_dims, arch)
        for number, head_dims in product(("float32", "tfloat32"), HEAD_DIMS):
            yield from sm80_float32_passes(number, head_dims, arch)
    if arch == 90:
        for number, head_dims, causal in product(HALF, _sm90.TILES, (False, True)):  # the tile may differ
            yield sm90_forward(Options(), number, head_dims, causal=causal)
        for number, head_dims, deterministic in product(HALF, _sm90_backward.TILES, (False, True)):
            yield from sm90_backward(Options(), number, head_dims, deterministic=deterministic)


def sm90_dbias(options: Options, number: str, head_dims: tuple[int, int], *, seqlen: int = 4096) -> Kernel:
    return _dbias.sm90(replace(problem(*head_dims), seqlen_k=seqlen), options, number, CHIPS[90], PAIRS)[0]


def kernels_with_options(arch: int) -> Iterator[Kernel]:
    """Each option alone, where the registers are fewest; and the kernels that only some options have."""
    if arch in (80, 90, 100):
        for feature in FEATURES:
            yield from passes(options(feature), "bfloat16", (128, 128), arch)
            yield from sm80_passes(options(feature), "bfloat16", (128, 128), arch)
    if arch == 90:
        yield find_blocks(options("mask_mod"))
        for feature, head_dims in product(FEATURES, ((64, 64), (128, 128))):
            yield sm90_forward(options(feature), "bfloat16", head_dims)
        for feature, head_dims in product(FEATURES, ((64, 64), (128, 128), (256, 256))):
            yield from sm90_backward(options(feature), "bfloat16", head_dims)
            yield _sm90_dq.kernel(head_dims, options(feature), "bfloat16", CHIPS[90])[0]
        for number, head_dims in product(HALF, ((64, 64), (128, 128), (192, 128), (256, 256))):
            yield sm90_dbias(options("bias"), number, head_dims)
        yield sm90_dbias(options("bias"), "bfloat16", (64, 64), seqlen=64)  # for a block alone, without a cluster
    if arch in (80, 90, 100, 120):
        yield _gradients.dsinks(problem(1, 1), options("sinks"), "float32")[0]
    for number, head_dims in product(numbers(arch), HEAD_DIMS):
        if number != "tfloat32":
            for by_mma in (False, True) if number == "float32" else (True,):
                yield _dbias.backward_dbias(
                    problem(*head_dims), options("bias"), number, CHIPS[arch], PAIRS, by_mma=by_mma
                )[0]


def reachable(arch: int) -> Iterator[Kernel]:
    yield from plain_kernels(arch)
    yield from kernels_with_options(arch)


def dims_of(kernel: Kernel) -> str:
    """As in symbols; empty for a kernel that knows no head dimension."""
    found = re.search(r"d\d+x\d+", kernel.symbol)
    return found.group() if found else ""


@cache
def plain_on_sm80() -> frozenset[tuple[str, tuple[str | int, ...]]]:
    return frozenset((kernel.symbol, kernel.arguments) for kernel in plain_kernels(80))


MOST_USED = ("", "d64x64", "d128x128", "d256x256")


def is_thorough(kernel: Kernel, arch: int) -> bool:
    """Whether "auto" does not take a kernel on a chip, or it hardly differs from one that is compiled anyway.

    sm_75 takes the code of sm_70, sm_86 and sm_89 the tiles of sm_120; float16 the code of bfloat16, and one TF32
    product less than that of three, so that D 64 is enough, on sm_80 and in the family sm90.
    """
    if arch in (75, 86, 89):
        return True
    if kernel.options is not None and kernel.options.names:
        return is_thorough_with_options(kernel, arch)
    symbol, header, dims = kernel.symbol, kernel.header, dims_of(kernel)
    if "sm90" in header:
        return "_f16" in symbol and (dims != "d64x64" or "finish" in header)
    if arch == 70:
        return dims not in ("", "d128x128", "d256x256")
    if "wmma" in header:
        return True
    return is_thorough_by_sm80(symbol, dims, arch) or (arch != 80 and (symbol, kernel.arguments) in plain_on_sm80())


def is_thorough_by_sm80(symbol: str, dims: str, arch: int) -> bool:
    """Likewise, of the kernels for sm_80 and later: on sm_80 most, on others those of other tiles."""
    # Parts have the code of the forward, and dK and dV alone that of the backward in one pass.
    like_another = any(part in symbol for part in ("delta", "merge", "finish", "parts", "dkdv_bf16", "dkdv_f16"))
    if "_f16" in symbol or "_tf32" in symbol:
        return like_another or dims != "d64x64" or arch != 80
    if arch != 80:
        # sm_90 and sm_100 have the same memory, so the same tiles: those of float32 on one, of 16 bits on the other.
        elsewhere = ("_f32" in symbol) if arch == 100 else (arch == 90 and "_f32" not in symbol)
        return like_another or elsewhere or "dq_bf16" in symbol or dims not in ("d128x128", "d256x256")
    if like_another or "dq_bf16" in symbol:
        return dims not in ("", "d128x128")
    # The rare ones of the forward and of the backward in one pass that are no multiple of another.
    rare = ("d96x96", "d192x128") if "fwd_sm80_bf16" in symbol or "bwd_sm80_bf16" in symbol else ()
    return dims not in (*MOST_USED, *rare)


def is_thorough_with_options(kernel: Kernel, arch: int) -> bool:
    """Likewise, of a kernel with an option: each goes once through every forward and every backward in one pass."""
    symbol, header, dims, names = kernel.symbol, kernel.header, dims_of(kernel), kernel.options.names
    if "dbias" in header:
        usual = ("d128x128",) if "wmma" in header else MOST_USED
        chips = (90,) if "sm90" in header else (70, 80)
        return dims not in usual or arch not in chips or ("_f16" in symbol and arch != 70)
    if header == "bwd_sm90_dq":
        return (dims, names) != ("d128x128", ("mod",))
    if header == "bwd_sm90_dkdv_wide":  # most of what it asks, bwd_sm90 asks too
        return names not in (("dropout",), ("mod",))
    # The last step needs few registers, whatever the options; parts and two passes ask them the same as the whole.
    if "wmma" in header or any(part in symbol for part in ("finish", "parts", "dkdv", "dq")):
        return True
    if "sm90" in header:  # the forward where registers are fewest, the backward as most models have it
        return dims == ("d128x128" if "fwd" in header else "d64x64")
    if header == "fwd_sm80":  # of what the backward is asked for too, what takes most registers
        few_queries = kernel.arguments[4] == _sm80_tiles.SHORT_TILES[128, 128].block_m
        return arch != 80 or few_queries or names not in (("bias",), ("dropout",), ("mod", "block_mask"))
    if header == "bwd_sm80_dkdv":  # ALiBi and sinks take few registers, and a mask no more than a bias
        return arch != 80 or names in (("alibi",), ("mask",), ("sinks",))
    return arch != 80 and header != "find_blocks"


def cases() -> list[object]:
    unique = {(kernel.symbol, kernel.arguments, arch): (kernel, arch) for arch in CHIPS for kernel in reachable(arch)}
    return [
        pytest.param(
            kernel,
            arch,
            id=f"{kernel.symbol}-sm_{arch}",
            marks=[pytest.mark.thorough] if is_thorough(kernel, arch) else [],
        )
        for kernel, arch in unique.values()
    ]


# What an option adds to a kernel that has no register left: the bytes that ptxas may park for it in memory, at most, by
# kernel and chip. Plain kernels park nothing, but for a word of the backward of sm90 with 192 and 128 columns, and
# three of the forward of sm80 with 96 on sm_90. In sm90 the warps of the backward that copy have 24 or 40 registers and
# park what they cannot hold, most of all where they draw for dropout; with 64 columns and a softcap or score_mod its
# consumers do too. With 64 columns the three consumers of the forward have 160 registers, and with one option they keep
# 128 keys.
MAY_PARK = {
    "bwd_sm80_dq_bf16_d128x128_mod": {90: 16},
    "bwd_sm90_bf16_d64x64_dropout": {90: 236},
    "bwd_sm90_bf16_d64x64_mod": {90: 48},
    "bwd_sm90_bf16_d64x64_mod_block_mask": {90: 20},
    "bwd_sm90_bf16_d64x64_softcap": {90: 160},
    "bwd_sm90_bf16_d128x128_softcap": {90: 8},
    "bwd_sm90_bf16_d128x128_bias": {90: 32},
    "bwd_sm90_bf16_d128x128_dropout": {90: 612},
    "bwd_sm90_bf16_d128x128_mask": {90: 32},
    "bwd_sm90_bf16_d128x128_mod": {90: 8},
    "bwd_sm90_bf16_d128x128_mod_block_mask": {90: 20},
    "bwd_sm90_bf16_d128x128_packed": {90: 80},
    "bwd_sm90_dkdv_bf16_d192x128": {90: 8},
    "bwd_sm90_dkdv_f16_d192x128": {90: 8},
    "bwd_sm90_dkdv_bf16_d256x256_dropout": {90: 236},
    "bwd_sm90_dkdv_bf16_d256x256_mod_block_mask": {90: 20},
    "bwd_sm90_dq_bf16_d128x128_mod": {90: 8},
    "bwd_wmma_dkdv_bf16_d128x128_mod": {80: 96, 90: 64, 100: 32},
    "bwd_wmma_dq_bf16_d128x128_mask": {80: 64},
    "bwd_wmma_dq_bf16_d128x128_mod": {100: 64},
    "fwd_sm80_bf16_d96x96": {90: 16},
    "fwd_sm80_f16_d96x96": {90: 16},
    "fwd_sm80_parts_bf16_d96x96": {90: 16},
    "fwd_sm80_parts_f16_d96x96": {90: 16},
    "fwd_sm80_bf16_d128x128_alibi": {90: 56},
    "fwd_sm80_bf16_d128x128_bias": {90: 32},
    "fwd_sm80_bf16_d128x128_dropout": {80: 16, 90: 92},
    "fwd_sm80_bf16_d128x128_mask": {90: 40},
    "fwd_sm80_bf16_d128x128_mod": {90: 8},
    "fwd_sm80_bf16_d128x128_mod_block_mask": {90: 120},
    "fwd_sm80_bf16_d128x128_softcap": {90: 52},
    "fwd_sm90_bf16_d64x64_alibi": {90: 56},
    "fwd_sm90_bf16_d64x64_bias": {90: 116},
    "fwd_sm90_bf16_d64x64_mod": {90: 88},
    "fwd_sm90_bf16_d64x64_softcap": {90: 180},
    "fwd_sm90_bf16_d128x128_mod": {90: 48},
    "fwd_wmma_bf16_d128x128_alibi": {90: 160},
    "fwd_wmma_bf16_d128x128_bias": {80: 224, 90: 192},
    "fwd_wmma_bf16_d128x128_dropout": {80: 16},
    "fwd_wmma_bf16_d128x128_mask": {80: 224, 90: 256},
    "fwd_wmma_bf16_d128x128_mod": {80: 96, 90: 352, 100: 32},
    "fwd_wmma_bf16_d128x128_mod_block_mask": {90: 32},
    "fwd_wmma_bf16_d128x128_packed": {90: 96},
}
# What ptxas notes, for whatever reason (C7510, C7514 and others), where it waits for each wgmma before the next: the
# kernel is right, and several times slower.
SERIALIZED = "wgmma.mma_async instructions are serialized"


@pytest.mark.parametrize("kernel, arch", cases())
def test_a_kernel_compiles_within_its_registers_and_uses_tensor_cores(kernel: Kernel, arch: int) -> None:
    if arch not in cubin.supported_archs():
        pytest.skip(f"this NVRTC knows no sm_{arch}")
    code, log = cubin.compile_for(kernel.source, f"sm_{arch}")

    (spills,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    allowed = MAY_PARK.get(kernel.symbol.removeprefix("cuflash_"), {}).get(arch, 0)
    assert max(map(int, spills)) <= allowed, log
    if arch == 70:
        return  # the disassembler knows no sm_70 any more
    # A module of two kernels once came out corrupt; the disassembler refuses such a cubin (docs/design.md, section 5).
    listing = cubin.disassembled(code)
    found = cubin.opcodes(listing)
    assert found["EXIT"] > 0
    assert not cubin.predicates_of_clamps(listing)
    assert allowed or not {"LDL", "STL"} & set(found)
    if kernel.arch == _wgmma.ARCH:
        assert found["HGMMA"] > 0
        assert found["UTMALDG"] > 0, "tiles must be copied by TMA"
        assert SERIALIZED not in log, log
    if kernel.header.startswith("bwd_sm90"):
        adds_dq = kernel.header == "bwd_sm90"
        assert (found["REDG"] > 0) == adds_dq, "sums of dQ are added in memory, by instructions that return nothing"
        # Blocks keep step where arrays of pairs come with each tile: there the copy engines would meet.
        by_copies = adds_dq and "d128x128" in kernel.symbol and not {"bias", "mask"} & set(kernel.options.names)
        assert (found["UBLKRED"] > 0) == by_copies, "half of them by the copy engine, where they are 128 columns"
    if "wmma" in kernel.header or ("sm80" in kernel.header and "finish" not in kernel.header):
        assert found["HMMA"] > 0
        if "f16" in kernel.symbol:
            assert found["LDSM"] > 0, "factors must come from shared memory by ldmatrix, not word by word"


def test_only_kernels_that_there_are_may_park() -> None:
    symbols = {arch: {kernel.symbol.removeprefix("cuflash_") for kernel in reachable(arch)} for arch in CHIPS}
    assert all(name in symbols[arch] for name, allowed in MAY_PARK.items() for arch in allowed)


@pytest.mark.parametrize("arch", CHIPS)
def test_every_tile_fits_the_shared_memory(arch: int) -> None:
    for kernel in reachable(arch):
        assert kernel.shared_bytes <= CHIPS[arch].shared_memory, kernel.symbol


@pytest.mark.parametrize("arch", CHIPS)
def test_the_gradient_of_a_bias_has_a_tile_beside_other_arrays(arch: int) -> None:
    bias = PAIRS._replace(dtype="float32")
    crowded = Options.of(problem(1, 1), {"bias": bias, "mask": MASK, "block_mask": ROWS})
    for number, head_dims in product(numbers(arch), HEAD_DIMS):
        for by_mma in (False, True):
            kernel, _ = _dbias.backward_dbias(problem(*head_dims), crowded, number, CHIPS[arch], bias, by_mma=by_mma)
            assert kernel.shared_bytes <= CHIPS[arch].shared_memory
        if arch == 90 and number in HALF:
            assert sm90_dbias(crowded, number, head_dims).shared_bytes <= CHIPS[90].shared_memory


CHECKED = [
    (80, _wmma.forward(problem(64, 64), Options(), "float16", CHIPS[80])[0]),
    (90, sm90_forward(options("bias"), "float16", (64, 64))),
    *((90, kernel) for kernel in sm90_backward(options("bias"), "float16", (64, 64), deterministic=True)),
]


@pytest.mark.parametrize(("arch", "kernel"), CHECKED, ids=lambda x: x.header if isinstance(x, Kernel) else f"sm_{x}")
def test_the_source_is_checked_against_what_python_believes(arch: int, kernel: Kernel) -> None:
    """A wrong size of the parameters or of shared memory does not compile."""
    source = kernel.source
    for right in (f"kSharedBytes == {kernel.shared_bytes}", f"sizeof(cuflash::{kernel.params}) == "):
        assert right in source.code
        wrong = replace(source, code=source.code.replace(right, right + "1"))
        with pytest.raises(cubin.CompileError, match="static assert"):
            cubin.compile_for(wrong, f"sm_{arch}")


def test_the_architecture_of_a_kernel_goes_before_that_of_the_chip() -> None:
    """CuPy puts its own -arch behind ours, and NVRTC takes the first: wgmma is there for sm_90a, not for sm_90."""
    source = sm90_forward(Options(), "bfloat16", (64, 64)).source
    code, _ = cubin.compile_for(source, "sm_90")
    assert cubin.opcodes(cubin.disassembled(code))["HGMMA"] > 0
    with pytest.raises(cubin.CompileError, match="wgmma"):
        cubin.compile_for(replace(source, arch=""), "sm_90")


def test_two_kernels_never_share_a_module() -> None:
    for kernel in reachable(90):
        assert kernel.source.code.count("__global__") == 1


def test_a_spill_would_be_seen() -> None:
    """The patterns above do match: a kernel with more live values than registers shows them."""
    source = _wmma.forward(problem(64, 64), Options(), "float16", CHIPS[80])[0].source
    limited = re.sub(r"__launch_bounds__\(\d+, \d+\)", "__launch_bounds__(128, 16)", source.code)
    code, log = cubin.compile_for(type(source)(source.symbol, limited, source.num_threads, 0), "sm_80")
    assert not re.search(r"\b0 bytes spill stores", log)
    assert cubin.opcodes(cubin.disassembled(code))["STL"] > 0


@pytest.mark.parametrize(("condition", "seen"), [("n == 32", True), ("n == 7", False)])
def test_a_predicate_of_a_clamp_would_be_seen(condition: str, seen: bool) -> None:
    """On an H200 ``n == 32`` comes out true for x from 0 to 31, and false from 33 on (docs/design.md, section 5)."""
    code = f"""
extern "C" __global__ void clamp(int* numbers) {{
  const int x = numbers[threadIdx.x], n = x < 0 ? 0 : x > 32 ? 32 : x;
  numbers[threadIdx.x] = {condition} ? n + 1000 : n;
}}
"""
    compiled, _ = cubin.compile_for(KernelSource("clamp", code, 128, 0), "sm_90")
    assert bool(cubin.predicates_of_clamps(cubin.disassembled(compiled))) == seen


PRODUCT = """\
#include <cuflash/ptx/wgmma.cuh>
#include <cuflash/common/numbers.cuh>
{wgmma}
using cuflash::ptx::TileDescriptor;
extern "C" __global__ void product(float* out, TileDescriptor a, TileDescriptor b, int n) {{
  float sum[32] = {{}};
  for (int i = 0; i < n; ++i) {{
    cuflash::ptx::wgmma_fence();
    cuflash::ptx::Wgmma<__half, 64>::multiply<false, false>(sum, a, b, true);
    cuflash::ptx::wgmma_commit();
    {between}
    cuflash::ptx::wgmma_wait<0>();
  }}
  for (float x : sum) *out++ = x;
}}
"""


@pytest.mark.parametrize(("between", "serialized"), [("", False), ("for (float& x : sum) x *= 2.0f;", True)])
def test_a_serialized_wgmma_would_be_seen(between: str, serialized: bool) -> None:
    """The note is in the log if a sum is used before its product was waited for."""
    code = PRODUCT.format(wgmma=wgmma("float16", 64), between=between)
    _, log = cubin.compile_for(KernelSource("product", code, 128, 0, _wgmma.ARCH), "sm_90")
    assert (SERIALIZED in log) == serialized
