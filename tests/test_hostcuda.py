"""The CPU emulation of tests/hostcuda: what CUDA offers works, and what CUDA forbids is reported."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash._device import Chip, KernelSource
from tests.hostcuda import CompileError, HostCudaError, HostDevice, sources
from tests.hostcuda.build import can_instrument
from tests.hostcuda.launch import SCHEDULES

Array = np.ndarray[Any, Any]

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host ring needs g++"),
]

BF16 = np.dtype(ml_dtypes.bfloat16)


def kernel(parameters: str, body: str, *, threads: int = 64, shared: int = 0, before: str = "") -> KernelSource:
    """A kernel of a few lines; line 1 of kernel.cu is the first line of the body."""
    code = f'{before}\nextern "C" __global__ void kernel({parameters}) {{\n#line 1\n{body}\n}}\n'
    return KernelSource("kernel", code, threads, shared)


def launch(device: HostDevice, source: KernelSource, *arguments: Any, blocks: int = 1) -> None:
    if not can_instrument(device.flavour):
        pytest.skip(f"the compiler cannot link {device.flavour}")
    (launch,) = device.load([source])
    launch(blocks, arguments)


# What CUDA offers


def test_indices_and_arguments() -> None:
    device = HostDevice()
    params = np.zeros(1, np.dtype([("offset", "i8"), ("factor", "f4")], align=True))
    params["offset"], params["factor"] = 100, 0.5
    x = np.arange(192, dtype=np.float32)
    y = device.empty((192,), np.float32)
    source = kernel(
        "const float* x, float* y, const float* nothing, const __grid_constant__ Params params",
        """const int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (nothing == nullptr) y[i] = params.factor * x[i] + params.offset + gridDim.x;""",
        before="struct Params { long long offset; float factor; };",
    )
    launch(device, source, x, y, 0, params, blocks=3)
    np.testing.assert_array_equal(y, 0.5 * x + 103)


def test_empty_is_full_of_nan() -> None:
    for dtype in (np.float16, BF16, np.float32):
        assert np.isnan(HostDevice().empty((3, 5), dtype).astype(np.float32)).all()
    assert HostDevice().empty((0, 5), np.float32).shape == (0, 5)


def test_shared_memory_starts_as_nan_in_every_block() -> None:
    source = kernel(
        "int* bits",
        """__shared__ int fixed[64];
        int* const dynamic = reinterpret_cast<int*>(cuflash::dynamic_shared_memory());
        bits[2 * (64 * blockIdx.x + threadIdx.x)] = fixed[threadIdx.x];
        bits[2 * (64 * blockIdx.x + threadIdx.x) + 1] = dynamic[threadIdx.x];
        fixed[threadIdx.x] = dynamic[threadIdx.x] = 0;""",
        shared=256,
        before="#include <cuflash/common/shared_memory.cuh>",
    )
    bits = np.zeros(4 * 64, np.int32)
    launch(HostDevice(), source, bits, blocks=2)
    assert (bits == -1).all()


def test_block_barrier_counts_votes() -> None:
    source = kernel(
        "int* result",
        """const int i = threadIdx.x;
        result[i] = __syncthreads_count(i < 5);
        result[64 + i] = __syncthreads_or(i == 63);
        result[128 + i] = __syncthreads_or(i == 64);
        result[192 + i] = __syncthreads_and(i < 64);
        result[256 + i] = __syncthreads_and(i < 63);""",
    )
    result = np.empty((5, 64), np.int32)
    for schedule in SCHEDULES:
        launch(HostDevice(schedule=schedule), source, result)
        np.testing.assert_array_equal(result, np.repeat([[5], [1], [0], [1], [0]], 64, axis=1))


def test_threads_that_have_exited_do_not_hold_up_a_barrier() -> None:
    source = kernel("int* result", "if (threadIdx.x >= 40) return; result[threadIdx.x] = __syncthreads_count(1);")
    result = np.zeros(64, np.int32)
    launch(HostDevice(), source, result)
    np.testing.assert_array_equal(result, np.where(np.arange(64) < 40, 40, 0))


def test_lanes_that_have_exited_do_not_hold_up_their_warp() -> None:
    source = kernel("int* y", "if (threadIdx.x % 2) return; y[threadIdx.x] = __ballot_sync(~0u, 1);", threads=32)
    for schedule in SCHEDULES:
        y = np.zeros(32, np.uint32)
        launch(HostDevice(schedule=schedule), source, y)
        np.testing.assert_array_equal(y, [0x55555555, 0] * 16)


def test_shuffles_and_votes() -> None:
    source = kernel(
        "int* result",
        """const unsigned all = 0xffffffffu;
        const int i = threadIdx.x;
        result[i] = __shfl_sync(all, i, 5);
        result[32 + i] = __shfl_sync(all, i, 3, 8);
        result[64 + i] = __shfl_xor_sync(all, i, 17);
        result[96 + i] = __shfl_up_sync(all, i, 4, 16);
        result[128 + i] = __shfl_down_sync(all, i, 4, 16);
        result[160 + i] = __ballot_sync(all, i % 3 == 0);
        result[192 + i] = __any_sync(all, i == 31) + 2 * __any_sync(all, i == 32);
        result[224 + i] = __all_sync(all, i < 31) + 2 * __all_sync(all, i < 32);
        if (i < 16) {
          result[256 + i] = __ballot_sync(0xffffu, 1);
        } else {
          result[256 + i] = __ballot_sync(0xffff0000u, i > 16);
        }""",
        threads=32,
    )
    i = np.arange(32)
    expected = [
        np.full(32, 5),
        i // 8 * 8 + 3,
        i ^ 17,
        np.where(i % 16 >= 4, i - 4, i),
        np.where(i % 16 < 12, i + 4, i),
        np.full(32, sum(1 << lane for lane in range(0, 32, 3))),
        np.full(32, 1),
        np.full(32, 2),
        np.where(i < 16, 0xFFFF, 0xFFFE0000),
    ]
    result = np.empty((9, 32), np.int32)
    for schedule in SCHEDULES:
        launch(HostDevice(schedule=schedule), source, result)
        np.testing.assert_array_equal(result.view(np.uint32), np.array(expected, np.uint32))


def test_arithmetic() -> None:
    source = kernel(
        "float* y",
        """int n = 0;
        y[n++] = exp2f(3.0f);
        y[n++] = log2f(8.0f);
        y[n++] = fmaxf(-1.0f, 2.0f);
        y[n++] = __expf(0.0f) + __logf(1.0f) + __fdividef(1.0f, 4.0f) + rsqrtf(4.0f);
        y[n++] = min(3, 4) + max(3ll, 4ll);
        y[n++] = __int_as_float(__float_as_int(1.5f));
        y[n++] = __uint_as_float(0x7f800000u);
        y[n++] = __popc(255u) + __ffs(8) + __clz(1);
        y[n++] = __half2float(__float2half_rn(1.0f / 3)) == 0.333251953125f;
        const float4 four = make_float4(1, 2, 3, 4);
        y[n++] = four.w + __ldg(y);""",
        threads=1,
    )
    y = np.empty(10, np.float32)
    launch(HostDevice(), source, y)
    np.testing.assert_array_equal(y, [8, 3, 2, 1.75, 7, 1.5, np.inf, 8 + 4 + 31, 1, 12])


@pytest.mark.parametrize("flavour", ["fast", "tsan"])
def test_atomic_add(flavour: Any) -> None:
    source = kernel("float* sum, int* count", "atomicAdd(sum, 0.5f); atomicAdd(count, 1);")
    total, count = np.zeros(1, np.float32), np.zeros(1, np.int32)
    launch(HostDevice(flavour=flavour), source, total, count, blocks=3)
    assert total == 96
    assert count == 192


@pytest.mark.parametrize(("capability", "arch"), [((7, 5), 750), ((9, 0), 900), ((12, 0), 1200)])
def test_the_chip_decides_the_architecture(capability: tuple[int, int], arch: int) -> None:
    device = HostDevice(chip=Chip("test", capability, 48 * 1024))
    result = np.zeros(1, np.int32)
    launch(device, kernel("int* y", "*y = __CUDA_ARCH__;", threads=1), result)
    assert result == arch


# wmma


WMMA = "#include <mma.h>\nusing namespace nvcuda;\n"
ELEMENTS = {
    "half": ("__half", "__half", 16, np.dtype(np.float16)),
    "bfloat16": ("__nv_bfloat16", "__nv_bfloat16", 16, BF16),
    "tf32": ("wmma::precision::tf32", "float", 8, np.dtype(np.float32)),
}


def wmma_product(element: str, layout_a: str, layout_b: str, layout_c: str) -> KernelSource:
    """Compute c (16, 16) += a (16, K) b (K, 16), each stored by rows or by columns."""
    type_, storage, depth, _ = ELEMENTS[element]
    pitch_a = depth if layout_a == "row" else 16
    pitch_b = 16 if layout_b == "row" else depth
    return kernel(
        f"const {storage}* a, const {storage}* b, float* c",
        f"""wmma::fragment<wmma::matrix_a, 16, 16, {depth}, {type_}, wmma::{layout_a}_major> fa;
        wmma::fragment<wmma::matrix_b, 16, 16, {depth}, {type_}, wmma::{layout_b}_major> fb;
        wmma::fragment<wmma::accumulator, 16, 16, {depth}, float> fc;
        wmma::load_matrix_sync(fa, a, {pitch_a});
        wmma::load_matrix_sync(fb, b, {pitch_b});
        wmma::load_matrix_sync(fc, c, 16, wmma::mem_{layout_c}_major);
        wmma::mma_sync(fc, fa, fb, fc);
        wmma::store_matrix_sync(c, fc, 16, wmma::mem_{layout_c}_major);""",
        threads=32,
        before=WMMA,
    )


def aligned(array: Array) -> Array:
    """The same array at a multiple of 32 bytes, as wmma loads want it."""
    memory = np.empty(array.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 32
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return np.asarray(result)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("layouts", [("row", "row", "row"), ("row", "col", "col"), ("col", "row", "row")])
def test_wmma_product(element: str, layouts: tuple[str, str, str]) -> None:
    depth, dtype = ELEMENTS[element][2:]
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (16, depth)).astype(dtype)  # small integers: every product and sum is exact
    b = rng.integers(-4, 5, (depth, 16)).astype(dtype)
    c = rng.integers(-4, 5, (16, 16)).astype(np.float32)
    expected = a.astype(np.float32) @ b.astype(np.float32) + c
    stored = [aligned(x if layout == "row" else x.T) for x, layout in zip((a, b, c), layouts, strict=True)]
    for fragment_layout in ("scrambled", "pairs"):
        result = aligned(stored[2])
        device = HostDevice(fragment_layout=fragment_layout)
        launch(device, wmma_product(element, *layouts), stored[0], stored[1], result)
        np.testing.assert_array_equal(result if layouts[2] == "row" else result.T, expected)


@pytest.mark.parametrize("use", ["matrix_a", "matrix_b", "accumulator"])
def test_fragment_layouts(use: str) -> None:
    layout = "" if use == "accumulator" else ", wmma::row_major"
    order = ", wmma::mem_row_major" if use == "accumulator" else ""
    element = "float" if use == "accumulator" else "__half"
    source = kernel(
        f"const {element}* indices, float* held, int* count",
        f"""wmma::fragment<wmma::{use}, 16, 16, 16, {element}{layout}> f;
        wmma::load_matrix_sync(f, indices, 16{order});
        for (int i = 0; i < f.num_elements; ++i) held[threadIdx.x * f.num_elements + i] = float(f.x[i]);
        *count = f.num_elements;""",
        threads=32,
        before=WMMA,
    )
    indices = aligned(np.arange(256, dtype=np.float32 if use == "accumulator" else np.float16))
    neighbours = {}
    for fragment_layout in ("scrambled", "pairs"):
        held, count = np.full(512, np.nan, np.float32), np.zeros(1, np.int32)
        device = HostDevice(fragment_layout=fragment_layout)
        launch(device, source, indices, held, count)
        assert count == (8 if use == "accumulator" else 16)
        held = held[: 32 * count[0]]
        assert np.array_equal(np.unique(held), np.arange(256))
        neighbours[fragment_layout] = (held[1::2] == held[::2] + 1) & (held[::2] % 2 == 0)
    assert neighbours["pairs"].all()
    assert not neighbours["scrambled"].any()


def test_tf32_is_rounded_and_what_was_not_is_truncated() -> None:
    unit = 2.0**-10
    x = np.array([1 + 0.5 * unit, 1 + 0.49 * unit, -1 - 0.5 * unit, 1 + 1.5 * unit, np.inf, np.nan], np.float32)
    body = "for (int i = 0; i < 6; ++i) y[i] = wmma::__float_to_tf32(x[i]);"
    source = kernel("const float* x, float* y", body, threads=1, before=WMMA)
    y = np.empty(6, np.float32)
    launch(HostDevice(), source, x, y)
    np.testing.assert_array_equal(y, [1 + unit, 1, -1 - unit, 1 + 2 * unit, np.inf, np.nan])

    a, b, c = (aligned(np.zeros(shape, np.float32)) for shape in ((16, 8), (8, 16), (16, 16)))
    a[0, 0], b[0, 0] = 1 + 1.9 * unit, 1
    launch(HostDevice(), wmma_product("tf32", "row", "row", "row"), a, b, c)
    assert c[0, 0] == 1 + unit


def test_fragments_start_as_nan() -> None:
    source = kernel(
        "float* y",
        "wmma::fragment<wmma::accumulator, 16, 16, 16, float> f; y[threadIdx.x] = f.x[threadIdx.x % 8];",
        threads=32,
        before=WMMA,
    )
    y = np.zeros(32, np.float32)
    launch(HostDevice(), source, y)
    assert np.isnan(y).all()


# Every way of running gives the same bits


@pytest.mark.parametrize(
    "settings",
    [
        *({"schedule": schedule, "seed": 5} for schedule in SCHEDULES),
        *({"flavour": "fast", "isolated": True}, {"flavour": "asan"}, {"flavour": "tsan"}),
        {"flags": ("-DHOSTCUDA_UCONTEXT",)},
        *(
            pytest.param({"flags": ("-DHOSTCUDA_UCONTEXT",), "flavour": flavour}, marks=pytest.mark.thorough)
            for flavour in ("asan", "tsan")
        ),
    ],
    ids=str,
)
def test_all_ways_of_running_agree(settings: dict[str, Any]) -> None:
    """A sum over a block, through shuffles and shared memory: the order of additions is fixed."""
    source = kernel(
        "const float* x, float* y",
        """float* const partial = reinterpret_cast<float*>(cuflash::dynamic_shared_memory());
        float sum = exp2f(x[blockIdx.x * 96 + threadIdx.x]);
        for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) y[blockIdx.x] = partial[0] + partial[1] + partial[2];""",
        threads=96,
        shared=12,
        before="#include <cuflash/common/shared_memory.cuh>",
    )
    x = np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)
    terms = np.exp2(x, dtype=np.float32)
    result = {}
    for name, device in {"default": HostDevice(), "other": HostDevice(**settings)}.items():
        result[name] = device.empty((4,), np.float32)
        launch(device, source, x, result[name], blocks=4)
    np.testing.assert_allclose(result["default"], terms.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(result["other"], result["default"])


# Arrays in a child process


@pytest.mark.parametrize("settings", [{}, {"isolated": True}, {"flavour": "asan"}], ids=str)
def test_views_share_their_buffer(settings: dict[str, Any]) -> None:
    base = np.arange(20, dtype=np.float32)
    reversed_, shifted = base[9::-1], base[10:]
    source = kernel(
        "const float* x, float* y",
        "y[threadIdx.x] = x[-static_cast<int>(threadIdx.x)] + y[10 - 20];",
        threads=10,
    )
    launch(HostDevice(**settings), source, reversed_, shifted)
    np.testing.assert_array_equal(base, [*range(10), *range(9, -1, -1)])


def test_read_only_and_broadcast_inputs() -> None:
    x = np.broadcast_to(np.float32(3), (64,))
    frozen = np.arange(64, dtype=np.float32)
    frozen.flags.writeable = False
    y = np.zeros(64, np.float32)
    source = kernel("const float* x, const float* f, float* y", "y[threadIdx.x] = *x + f[threadIdx.x];")
    for flavour in ("fast", "asan"):
        y[...] = 0
        launch(HostDevice(flavour=flavour), source, x, frozen, y)
        np.testing.assert_array_equal(y, 3 + frozen)


@pytest.mark.parametrize("settings", [{"isolated": True}, {"flavour": "asan"}, {"flavour": "tsan"}], ids=str)
def test_arrays_behind_pointers_of_structs_travel_too(settings: dict[str, Any]) -> None:
    device, x = HostDevice(**settings), np.arange(64, dtype=np.float32)
    view, y = x[32:], np.zeros(32, np.float32)
    params = np.zeros(1, np.dtype([("factor", "f4"), ("view", "u8"), ("null", "u8")], align=True))
    params["factor"], params["view"] = 2, device.pointer(view)
    body = "y[threadIdx.x] = params.null ? 0 : params.factor * params.view[threadIdx.x];"
    before = "struct Params { float factor; const float *view, *null; };"
    launch(device, kernel("float* y, Params params", body, threads=32, before=before), y, params)
    np.testing.assert_array_equal(y, 2 * view)


# What CUDA forbids: barriers


def test_a_deadlock_names_its_barriers() -> None:
    source = kernel(
        "int* y",
        """if (threadIdx.x < 32) {
          __syncthreads();
        } else if (threadIdx.x < 64) {
          if (threadIdx.x > 32) __syncwarp();
          else while (__shfl_sync(1u, 1, 0)) __syncthreads();
        }""",
        threads=96,
    )
    with pytest.raises(HostCudaError) as error:
        launch(HostDevice(strict=False), source, 0)
    assert str(error.value).splitlines() == [
        "block 0: deadlock",
        "  threads 0 to 31 wait in __syncthreads at kernel.cu:2",
        "  threads 32 to 32 wait in __syncthreads at kernel.cu:5",
        "  threads 33 to 63 wait in __syncwarp at kernel.cu:4 with mask ffffffff",
        "  threads 64 to 95 have exited",
    ]


def test_divergent_block_barrier() -> None:
    source = kernel("int* y", "if (threadIdx.x < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}")
    with pytest.raises(HostCudaError, match=r"divergent __syncthreads: kernel.cu:4 here, .* thread 0 waits at .*:2"):
        launch(HostDevice(), source, 0)
    launch(HostDevice(strict=False), source, 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "if (threadIdx.x < 16) __syncwarp(); else __ballot_sync(~0u, 1);",
            "divergent warp: .* __ballot_sync",
        ),
        ("if (threadIdx.x < 3) __syncwarp(threadIdx.x == 0 ? 3u : 7u);", "divergent warp: .* mask 00000003"),
        ("__syncwarp(0xffffu);", "lane 16 is not in its mask 0000ffff"),
        ("if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);", "reads from lane 20, which takes no part"),
        ("if (threadIdx.x == 3) __trap();", "thread 3: __trap"),
    ],
)
def test_wrong_warp_operations(body: str, message: str) -> None:
    with pytest.raises(HostCudaError, match=message):
        launch(HostDevice(), kernel("int* y", body, threads=32), 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "wmma::load_matrix_sync(f, x + 4, 16, wmma::mem_row_major);",
            "kernel.cu:2: .* not a multiple of 32",
        ),
        ("wmma::load_matrix_sync(f, x, 17, wmma::mem_row_major);", "leading dimension of 17 elements"),
        (
            "wmma::store_matrix_sync(x + threadIdx.x / 16 * 8, f, 16, wmma::mem_row_major);",
            "lanes .* disagree",
        ),
        ("if (threadIdx.x) wmma::store_matrix_sync(x, f, 16, wmma::mem_row_major);", "lanes .* disagree"),
        ("if (threadIdx.x == 31) return; wmma::mma_sync(f, a, b, f);", "some lanes of the warp have exited"),
    ],
)
def test_wrong_wmma(body: str, message: str) -> None:
    source = kernel(
        "float* x",
        f"""wmma::fragment<wmma::accumulator, 16, 16, 16, float> f; {FACTORS}
        {body}
        __syncwarp();""",
        threads=32,
        before=WMMA,
    )
    with pytest.raises(HostCudaError, match=message):
        launch(HostDevice(), source, aligned(np.zeros(512, np.float32)))


FACTORS = """wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> a; \
wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> b;"""


# What CUDA forbids: memory


@pytest.mark.parametrize("address", ["x[64]", "x[-1]", "shared[64]", "shared[-1]", "y[1]"])
def test_asan_sees_accesses_outside_of_arrays(address: str) -> None:
    source = kernel(
        "const float* x, float* y, float* z",
        f"""float* const shared = reinterpret_cast<float*>(cuflash::dynamic_shared_memory());
        shared[threadIdx.x] = x[threadIdx.x];
        if (threadIdx.x == 40) *z = {address};""",
        shared=256,
        before="#include <cuflash/common/shared_memory.cuh>",
    )
    base = np.zeros(100, np.float32)
    arguments = (np.zeros(64, np.float32), base[99:], np.zeros(1, np.float32))
    with pytest.raises(
        HostCudaError, match=r"AddressSanitizer: heap-buffer-overflow|AddressSanitizer: .*poison"
    ) as error:
        launch(HostDevice(flavour="asan"), source, *arguments)
    assert "kernel.cu:3" in str(error.value)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("index", "side"), [("-1", "before"), ("15", "after")])
def test_fences_show_stores_outside_of_allocated_arrays(isolated: bool, index: str, side: str) -> None:
    device = HostDevice(isolated=isolated)
    source = kernel("const float* x, float* y", f"y[{index}] = *x;", threads=1)
    with pytest.raises(HostCudaError, match=f"kernel, argument 1: the kernel wrote to memory {side} the array"):
        launch(device, source, np.ones(1, np.float32), device.empty((3, 5), np.float32))


def test_ubsan_sees_misaligned_vectors() -> None:
    source = kernel("float4* x, float* y", "x[0] = *reinterpret_cast<const float4*>(y + 1);", threads=1)
    with pytest.raises(HostCudaError, match=r"kernel.cu:1:.* misaligned address"):
        launch(HostDevice(flavour="asan"), source, np.zeros(4, np.float32), np.zeros(8, np.float32))


def test_a_child_process_keeps_a_crash_to_itself() -> None:
    with pytest.raises(HostCudaError, match="exit status -11"):
        launch(HostDevice(isolated=True), kernel("int* y", "*y = 1;", threads=1), 0)


def test_a_child_process_may_not_run_for_ever() -> None:
    source = kernel("volatile int* y", "while (*y == 0) {}", threads=1)
    with pytest.raises(HostCudaError, match=r"still running after 0\.5 s"):
        launch(HostDevice(isolated=True, timeout=0.5), source, np.zeros(1, np.int32))


# What CUDA forbids: races


def reversal(barrier: str) -> KernelSource:
    """Reverse x through shared memory."""
    return kernel(
        "const float* x, float* y",
        f"""float* const shared = reinterpret_cast<float*>(cuflash::dynamic_shared_memory());
        shared[threadIdx.x] = x[threadIdx.x];
        {barrier}
        y[threadIdx.x] = shared[63 - threadIdx.x];""",
        shared=256,
        before="#include <cuflash/common/shared_memory.cuh>",
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_show_a_missing_barrier(schedule: Any) -> None:
    x = np.arange(64, dtype=np.float32)
    device = HostDevice(schedule=schedule)
    y, wrong = device.empty((64,), np.float32), device.empty((64,), np.float32)
    launch(device, reversal("__syncthreads();"), x, y)
    np.testing.assert_array_equal(y, x[::-1])
    launch(device, reversal("__syncwarp();"), x, wrong)
    assert np.isnan(wrong).any()


def test_tsan_sees_a_missing_block_barrier() -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    device = HostDevice(flavour="tsan")
    launch(device, reversal("__syncthreads();"), x, y)
    np.testing.assert_array_equal(y, x[::-1])
    with pytest.raises(HostCudaError, match=r"ThreadSanitizer: data race[^Z]*kernel.cu:4"):
        launch(device, reversal("__syncwarp();"), x, y)


def test_tsan_sees_a_missing_warp_barrier() -> None:
    def source(barrier: str) -> KernelSource:
        return kernel(
            "float* y",
            f"""__shared__ float shared[32];
            shared[threadIdx.x] = threadIdx.x;
            {barrier}
            y[threadIdx.x] = shared[threadIdx.x ^ 1];""",
            threads=32,
        )

    device, y = HostDevice(flavour="tsan"), np.zeros(32, np.float32)
    launch(device, source("__syncwarp();"), y, blocks=2)
    with pytest.raises(HostCudaError, match="ThreadSanitizer: data race"):
        launch(device, source("__shfl_sync(~0u, 1, 0);"), y)  # a shuffle orders no memory


def test_tsan_sees_two_blocks_that_write_the_same_element() -> None:
    def source(index: str) -> KernelSource:
        return kernel("float* y", f"__syncthreads(); y[{index}] = 1; __syncthreads();", threads=32)

    device, y = HostDevice(flavour="tsan"), np.zeros(96, np.float32)
    launch(device, source("32 * blockIdx.x + threadIdx.x"), y, blocks=3)
    with pytest.raises(HostCudaError, match="ThreadSanitizer: data race"):
        launch(device, source("threadIdx.x"), y, blocks=2)


# cp.async


COPIES = "#include <cuflash/common/shared_memory.cuh>\n#include <cuflash/ptx/cp_async.cuh>"


def pipeline(pending: int) -> KernelSource:
    """Copy x in two groups of 16 bytes per thread; odd threads write zeros instead of the second."""
    return kernel(
        "const float4* x, float4* y",
        f"""float4* const shared = reinterpret_cast<float4*>(cuflash::dynamic_shared_memory());
        for (int group = 0; group < 2; ++group) {{
          const int i = 2 * threadIdx.x + group;
          const bool valid = group == 0 || threadIdx.x % 2 == 0;
          cuflash::ptx::cp_async_16(shared + i, valid ? x + i : x + 1000000, valid);
          cuflash::ptx::cp_async_commit();
        }}
        cuflash::ptx::cp_async_wait<{pending}>();
        y[2 * threadIdx.x] = shared[2 * threadIdx.x];
        y[2 * threadIdx.x + 1] = shared[2 * threadIdx.x + 1];""",
        threads=4,
        shared=128,
        before=COPIES,
    )


@pytest.mark.parametrize("flavour", ["fast", "asan", "tsan"])
@pytest.mark.parametrize("cp_async", ["eager", "lazy"])
def test_copies(flavour: Any, cp_async: Any) -> None:
    x, y = np.arange(1, 33, dtype=np.float32).reshape(8, 4), np.zeros((8, 4), np.float32)
    launch(HostDevice(flavour=flavour, cp_async=cp_async), pipeline(0), x, y)
    np.testing.assert_array_equal(y, np.where(np.arange(8)[:, None] % 4 == 3, 0, x))


def test_lazy_copies_show_a_wait_that_is_too_weak() -> None:
    x, y = np.ones((8, 4), np.float32), np.zeros((8, 4), np.float32)
    launch(HostDevice(), pipeline(1), x, y)
    assert not np.isnan(y).any()  # eager copies hide it
    launch(HostDevice(cp_async="lazy"), pipeline(1), x, y)
    assert np.isnan(y[1::2]).all()
    assert not np.isnan(y[::2]).any()


def test_chips_without_asynchronous_copies_copy_at_once() -> None:
    x, y = np.ones((8, 4), np.float32), np.zeros((8, 4), np.float32)
    device = HostDevice(cp_async="lazy", chip=Chip("turing", (7, 5), 64 * 1024))
    launch(device, pipeline(1), x, y)
    assert not np.isnan(y).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("shared + 1, x, true", "kernel.cu:2: an address is not a multiple of 16"),
        ("shared, x + 1, true", "kernel.cu:2: an address is not a multiple of 16"),
        ("x, x, true", "not in dynamic shared memory"),
        ("shared + 32, x, true", "not in dynamic shared memory"),
    ],
)
def test_wrong_copies(arguments: str, message: str) -> None:
    source = kernel(
        "float* x",
        f"""float* const shared = reinterpret_cast<float*>(cuflash::dynamic_shared_memory());
        cuflash::ptx::cp_async_16({arguments});""",
        threads=1,
        shared=128,
        before=COPIES,
    )
    with pytest.raises(HostCudaError, match=message):
        launch(HostDevice(), source, np.zeros(8, np.float32))


# Launches that cannot be


def test_arguments_are_checked() -> None:
    device = HostDevice()
    params = np.zeros(1, np.dtype([("a", "i4"), ("b", "i4"), ("c", "i4")]))
    source = kernel("float* y, Params params", "", before="struct Params { int a, b; };")
    y = np.zeros(1, np.float32)
    with pytest.raises(HostCudaError, match="takes 2 arguments, got 1"):
        launch(device, source, y)
    with pytest.raises(HostCudaError, match="argument 1 of the kernel has 8 bytes, got 12"):
        launch(device, source, y, params)
    with pytest.raises(TypeError, match="not list"):
        launch(device, source, [1.0], params)
    with pytest.raises(TypeError, match="not int 7"):
        launch(device, source, 7, params)
    with pytest.raises(HostCudaError, match="a grid of 0 blocks"):
        launch(device, source, y, params, blocks=0)


def test_resources_are_checked() -> None:
    device = HostDevice(chip=Chip("small", (7, 5), 1024))
    with pytest.raises(HostCudaError, match="kernel wants 1025 bytes of shared memory, small has 1024"):
        device.load([kernel("int* y", "", shared=1025)])
    with pytest.raises(HostCudaError, match="a block of 1056 threads"):
        device.load([kernel("int* y", "", threads=1056)])


def test_compiler_errors_are_passed_on() -> None:
    with pytest.raises(CompileError, match=r"kernel.cu:1:\d+: error: .*undeclared_name"):
        HostDevice().load([kernel("int* y", "*y = undeclared_name;")])


# The cache


def test_a_kernel_is_compiled_again_only_when_something_that_it_includes_changes(tmp_path: Path) -> None:
    tree = tmp_path / "cuflash"
    tree.mkdir()
    (tree / "used.cuh").write_text("#include <cuflash/deep.cuh>\n")
    (tree / "deep.cuh").write_text("constexpr int kValue = 1;\n")
    (tree / "unused.cuh").write_text("")
    source = kernel("int* y", "*y = kValue;", threads=1, before="// digest 1\n#include <cuflash/used.cuh>")
    first = sources.closure_digest(source.code, tmp_path)
    (tree / "unused.cuh").write_text("something else")
    assert sources.closure_digest(source.code.replace("digest 1", "digest 2"), tmp_path) == first
    y = np.zeros(1, np.int32)
    launch(HostDevice(cuda_src=tmp_path), source, y)
    assert y == 1

    other = tmp_path / "other" / "cuflash"
    other.mkdir(parents=True)
    (other / "used.cuh").write_text("#include <cuflash/deep.cuh>\n")
    (other / "deep.cuh").write_text("constexpr int kValue = 2;\n")
    assert sources.closure_digest(source.code, other.parent) != first
    launch(HostDevice(cuda_src=other.parent), source, y)
    assert y == 2


def test_production_sources_hold_no_trace_of_the_emulation() -> None:
    for path in sources.CUDA_SRC.rglob("*.cuh"):
        assert not re.search("hostcuda", path.read_text(), re.IGNORECASE), path


def included_by(path: Path) -> set[Path]:
    """The library's headers that a header includes, directly or not."""
    found: set[Path] = set()
    for name in re.findall(r"#include <(cuflash/\S+)>", (sources.CUDA_SRC / path).read_text()):
        found |= {Path(name)} | included_by(Path(name))
    return found


def test_every_wrapper_of_ptx_has_a_shadow() -> None:
    """Of those that a kernel includes, or what runs alone."""
    instruction = re.compile(r'asm( volatile)?\(\s*"[^"]|__cvta_|__isGlobal')
    paths = sources.CUDA_SRC.glob("cuflash/kernels/*.cuh")
    kernels = {path.relative_to(sources.CUDA_SRC) for path in paths}
    by_options = {Path("cuflash/attention/array_view.cuh")}  # included by what the JIT writes
    alone = {Path("cuflash/attention/survivor_tile.cuh")}  # tests/test_survivor_tile.py
    headers = set().union(*map(included_by, kernels | by_options | alone))
    wrappers = {path for path in headers if instruction.search((sources.CUDA_SRC / path).read_text())}
    shadows = {path.relative_to(sources.SHADOW) for path in sources.SHADOW.glob("cuflash/ptx/*.cuh")}
    assert wrappers == shadows
