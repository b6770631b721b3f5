"""What only a GPU can show: large offsets, long sequences, streams, graphs, memory, races by repetition."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np
import pytest

import cuflash
from cuflash import _dbias
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem, PairArray

pytestmark = pytest.mark.gpu

GIB = 2**30
KERNELS = ("auto", "sm80", "wmma")  # on some chips "auto" means another family


def kernels_of(*dtypes: str) -> list[tuple[str, str]]:
    """Return pairs of a dtype and a kernel that computes it."""
    return [(dtype, kernel) for dtype in dtypes for kernel in KERNELS]


def needs_memory(cupy: Any, size: int) -> None:
    """Skip unless this many bytes are free; give back what earlier tests left in the pool."""
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free GPU memory, there are {free / GIB:.0f}")


def normal(cupy: Any, shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    return cupy.random.default_rng(seed).standard_normal(shape, dtype=cupy.float32).astype(dtype)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def strided(cupy: Any, memory: Any, x: Any, strides: tuple[int, ...], offset: int) -> Any:
    """Return a copy of `x` that lies in `memory` from `offset` on, with these strides, all in elements."""
    bytes_per_element = x.itemsize
    view = cupy.ndarray(
        x.shape,
        x.dtype,
        memory.data + offset * bytes_per_element,
        strides=tuple(stride * bytes_per_element for stride in strides),
    )
    view[...] = x
    return view


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis", ["batch", "heads", "rows"])
def test_offsets_beyond_2_to_the_31_elements(gpu: Any, axis: str, kernel: str) -> None:
    """Arrays whose last elements are more than 2**31 elements from their first ones, along one axis."""
    needs_memory(gpu, 12 * GIB)
    batch, heads, rows, columns = 2, 2, 66, 64
    stride = {"batch": 2**31 + 64, "heads": 2**31 + 64, "rows": (2**31 // 65 // 64 + 2) * 64}[axis]
    order = ("batch", "heads", "rows").index(axis)
    strides = [heads * rows * columns, rows * columns, columns, 1]
    strides[order] = stride
    if axis != "batch":
        strides[0] = 1 << 14 if axis == "heads" else heads * columns
    if axis == "rows":
        strides[1] = columns
    span = sum(n * s for n, s in zip((batch - 1, heads - 1, rows - 1, columns), strides, strict=True))
    assert span > 2**31
    # Six arrays between one another in one piece of memory, 2**16 elements apart.
    memory = gpu.empty(span + 6 * (1 << 16), "float16")
    inputs = [normal(gpu, (batch, heads, rows, columns), "float16", seed) for seed in range(4)]
    q, k, v, dout = (strided(gpu, memory, x, tuple(strides), i * (1 << 16)) for i, x in enumerate(inputs))
    out = strided(gpu, memory, gpu.zeros_like(inputs[0]), tuple(strides), 4 * (1 << 16))
    options = {"causal": True, "kernel": kernel}
    expected, lse = cuflash.attention(*inputs[:3], return_lse=True, **options)
    cuflash.attention(q, k, v, out=out, **options)
    assert_same_bits(out, expected)
    options["deterministic"] = True
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    same_gradients = cuflash.attention_backward(inputs[3], *inputs[:3], expected, lse, **options)
    for gradient, same in zip(gradients, same_gradients, strict=True):
        assert_same_bits(gradient, same)


def test_more_than_2_to_the_31_elements(gpu: Any) -> None:
    """Contiguous arrays, the gradients among them, of more than 2**31 elements."""
    needs_memory(gpu, 60 * GIB)
    seqlen, head_dim = 128, 64
    heads = 2**31 // (seqlen * head_dim) + 3
    few = normal(gpu, (3, seqlen, head_dim), "float16"), normal(gpu, (3, seqlen, head_dim), "float16", 1)
    q = gpu.empty((heads, seqlen, head_dim), "float16")
    k, v, dout = (gpu.empty_like(q) for _ in range(3))
    for x, values in ((q, few[0]), (k, few[1]), (v, few[0]), (dout, few[1])):
        x[...] = values[0]
        x[-3:] = values
    assert q.size > 2**31
    out, vjp = cuflash.attention_vjp(q, k, v, deterministic=True)
    same, same_vjp = cuflash.attention_vjp(q[-3:], k[-3:], v[-3:], deterministic=True)
    assert_same_bits(out[-3:], same)
    for gradient, expected in zip(vjp(dout), same_vjp(dout[-3:]), strict=True):
        assert_same_bits(gradient[-3:], expected)
        assert_same_bits(gradient[0], expected[0])


@pytest.mark.parametrize(("dtype", "kernel"), kernels_of("float16", "float32"))
def test_200_repetitions_give_the_same_bits(gpu: Any, dtype: str, kernel: str) -> None:
    """Races show as differences; other work on a second stream shuffles the order of blocks."""
    q, k, v, dout = (normal(gpu, (2, 4, 517, 64), dtype, seed) for seed in range(4))
    k, v = k[:, :2], v[:, :2]
    noise = gpu.ones((512, 512), "float32")
    other = gpu.cuda.Stream(non_blocking=True)
    first = None
    differing = gpu.zeros((), "int64")
    for _ in range(200):
        with other:
            noise @ noise
        out, vjp = cuflash.attention_vjp(q, k, v, causal=True, kernel=kernel, deterministic=True)
        results = (out, *vjp(dout))
        bits = [x.view("uint16" if dtype == "float16" else "uint32") for x in results]
        first = first or bits
        for x, y in zip(bits, first, strict=True):
            differing += (x != y).sum()
    assert int(differing) == 0


def row_problem(q: Any, k: Any, v: Any, i: int) -> tuple[Any, Any, Any]:
    """Row `i` of a causal problem, as a problem of its own."""
    return q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1]


@pytest.mark.parametrize("seqlen", [65_536, 131_072])
def test_rows_of_a_long_sequence(gpu: Any, seqlen: int) -> None:
    needs_memory(gpu, 8 * GIB)
    q, k, v = (normal(gpu, (8, seqlen, 64), "bfloat16", seed) for seed in range(3))
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    some = slice(3, 5)  # of the heads: the reference is slow
    for i in (0, 127, 4096, seqlen // 2 + 17, seqlen - 1):
        row = slice(i, i + 1)
        assert_attention_accurate(*row_problem(q[some], k[some], v[some], i), out[some, row], lse[some, row])


def key_gradients(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, keys: Any, work: str, storage: str
) -> tuple[Any, Any]:
    """Return dk and dv of some keys of a causal problem, in the dtype `work`, P and dS rounded first."""
    import cupy

    scale = 1 / math.sqrt(q.shape[-1])
    queries = cupy.arange(q.shape[1])[:, None]
    dout, q, k, v, out, lse = (x.astype(work) for x in (dout, q, k[:, keys], v[:, keys], out, lse))
    p = cupy.where(queries >= keys, cupy.exp(q @ k.swapaxes(1, 2) * scale - lse[..., None]), 0)
    ds = p * (dout @ v.swapaxes(1, 2) - (dout * out).sum(axis=-1, keepdims=True))
    p, ds = (x.astype(storage).astype(work) for x in (p, ds))
    dk, dv = ds.swapaxes(1, 2) @ q * scale, p.swapaxes(1, 2) @ dout
    return dk.astype(storage).astype("float64"), dv.astype(storage).astype("float64")


def test_gradients_of_a_long_sequence(gpu: Any) -> None:
    """Some rows against the reference, and some keys against sums over all queries, by the same rule."""
    needs_memory(gpu, 24 * GIB)
    seqlen = 65_536
    q, k, v, dout = (normal(gpu, (8, seqlen, 64), "bfloat16", seed) for seed in range(4))
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    dq, dk, dv = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)

    for i in (129, 40_000, seqlen - 1):
        row = slice(i, i + 1)
        alone = row_problem(q[:2], k[:2], v[:2], i)
        expected, *_ = cuflash.testing.reference_attention_backward(dout[:2, row], *alone)
        plain, *_ = cuflash.testing.plain_attention_backward(dout[:2, row], *alone)
        allowed = 2 * np.abs(plain.astype(float) - expected).max() + 2.0**-8 * np.abs(expected).max()
        assert np.abs(gpu.asnumpy(dq[:2, row]).astype(float) - expected).max() <= allowed

    keys = gpu.asarray([0, 1, 63, 64, 5000, 32_768, 65_000, 65_535])
    exact = key_gradients(dout, q, k, v, out, lse, keys, "float64", "float64")
    plain_ = key_gradients(dout, q, k, v, out, lse, keys, "float32", "bfloat16")
    for gradient, expected, rounded in zip((dk, dv), exact, plain_, strict=True):
        allowed = 2 * float(abs(rounded - expected).max()) + 2.0**-8 * float(abs(expected).max())
        assert float(abs(gradient[:, keys].astype("float64") - expected).max()) <= allowed


def floats_of_a_query(cupy: Any) -> int:
    """Return what a backward with head_dim 64 keeps for a query: delta, on Hopper lse once more, and the sums of dq."""
    capability = int(cupy.cuda.Device().compute_capability)
    return 1 + (capability == 90) + (64 if capability >= 80 else 0)


def test_memory_beyond_the_results_is_linear(gpu: Any) -> None:
    pool = gpu.get_default_memory_pool()
    for seqlen in (4096, 32_768):
        q, k, v, dout = (normal(gpu, (8, seqlen, 64), "float16", seed) for seed in range(4))
        pool.free_all_blocks()
        before = pool.total_bytes()
        out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
        assert pool.total_bytes() - before <= out.nbytes + lse.nbytes + 4096
        before = pool.total_bytes()
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
        workspace = 4 * 8 * (seqlen * floats_of_a_query(gpu) + seqlen // 128)
        assert pool.total_bytes() - before <= sum(x.nbytes for x in gradients) + workspace + 4096
        del q, k, v, dout, out, lse, gradients


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


def spin(cupy: Any, cycles: int = 500_000_000) -> None:
    """Keep the current stream busy for about a third of a second."""
    cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(cycles),))


def test_work_goes_to_the_current_stream_and_nobody_waits_for_it(gpu: Any) -> None:
    arrays = [normal(gpu, (2, 4, 129, 64), "float16", seed) for seed in range(4)]
    expected, vjp = cuflash.attention_vjp(*arrays[:3], causal=True)
    gradients = vjp(arrays[3])
    late = [gpu.zeros_like(x) for x in arrays]
    spin(gpu, 1)
    gpu.cuda.Device().synchronize()
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(2):  # the first fills the stream's memory pool, and may allocate, which waits
            out = late_vjp = results = None
            spin(gpu)
            for x, y in zip(late, arrays, strict=True):
                x[...] = y
            out, late_vjp = cuflash.attention_vjp(*late[:3], causal=True)
            results = late_vjp(late[3])
            still_running = not stream.done
            stream.synchronize()
            for x in late[:3]:
                x.fill(0)
    assert still_running
    assert_same_bits(out, expected)
    for result, same in zip(results, gradients, strict=True):
        assert_same_bits(result, same)


def capture(stream: Any, step: Callable[[], Any]) -> tuple[Any, Any]:
    """Capture a step on this stream, the current one; return its results, which replays write to, and the graph."""
    warm = step()  # compiles the kernels, and leaves memory in the stream's pool
    stream.synchronize()
    del warm
    stream.begin_capture()
    captured = step()
    return captured, stream.end_capture()


def test_calls_can_be_captured_in_a_cuda_graph(gpu: Any) -> None:
    q, k, v, dout = (normal(gpu, (2, 4, 129, 64), "float16", seed) for seed in range(4))
    out = gpu.empty_like(q)
    stream = gpu.cuda.Stream(non_blocking=True)
    gpu.cuda.Device().synchronize()
    with stream:

        def step() -> Any:
            _, lse = cuflash.attention(q, k, v, causal=True, out=out, return_lse=True)
            return lse, *cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)

        captured, graph = capture(stream, step)
        for seed, x in enumerate((q, k, v, dout), start=10):
            x[...] = normal(gpu, x.shape, "float16", seed)
        graph.launch(stream)
        stream.synchronize()
        replayed = [x.copy() for x in (out, *captured)]
        lse, *gradients = step()
        stream.synchronize()
    for result, expected in zip(replayed, (out, lse, *gradients), strict=True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_replay_writes_to_no_memory_of_others(gpu: Any, kernel: str) -> None:
    """What a captured call needs for itself goes back to no pool, or the next array there would be written to."""
    q, k, v, dout = (normal(gpu, (2, 4, 129, 64), "float16", seed) for seed in range(4))
    one, keys = normal(gpu, (2, 4, 1, 64), "float16"), normal(gpu, (1, 4, 8192, 64), "float16")  # keys in parts
    stream = gpu.cuda.Stream(non_blocking=True)
    gpu.cuda.Device().synchronize()
    with stream:

        def step() -> Any:
            out, lse = cuflash.attention(q, k, v, return_lse=True, kernel=kernel)
            gradients = cuflash.attention_backward(dout, q, k, v, out, lse, kernel=kernel)
            few, few_lse = cuflash.attention(one, keys, keys, return_lse=True, kernel=kernel)
            of_shared = cuflash.attention_backward(one, one, keys, keys, few, few_lse, kernel=kernel)
            merged = cuflash.merge_states(out, lse, out, lse)
            of_merged = cuflash.merge_states_backward(dout, lse, out, lse, out, lse)
            return out, lse, *gradients, few, few_lse, *of_shared, *merged, *of_merged

        captured, graph = capture(stream, step)
        others = [gpu.full(size // 4, 7.0, "float32") for size in (512 * 2**i for i in range(16)) for _ in range(4)]
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
        assert all(bool((x == 7.0).all()) for x in others)
        for result, expected in zip(captured, step(), strict=True):
            error = abs(result.astype("float32") - expected.astype("float32")).max()  # sums of dQ come in any order
            assert float(error) < 1e-2


def test_a_graph_is_replayed_with_other_lengths_and_another_seed(gpu: Any) -> None:
    """Lengths and seeds are read on the device, so that one capture serves batches of any lengths."""
    total, heads = 300, 4
    q, k, v, dout = (normal(gpu, (total, heads, 64), "float16", seed) for seed in range(4))
    cu_seqlens = gpu.zeros(5, "int32")
    seed = gpu.zeros(1, "uint64")
    batches = [((0, 100, 100, 250, 290), 3), ((0, 1, 2, 299, 300), 4), ((0, 0, 0, 0, 170), 5)]
    options = {"causal": True, "dropout_p": 0.2, "seed": seed}

    def step() -> Any:
        out, lse = cuflash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, return_lse=True, **options)
        gradients = cuflash.attention_varlen_backward(
            dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, **options, deterministic=True
        )
        return out, lse, *gradients

    stream = gpu.cuda.Stream(non_blocking=True)
    gpu.cuda.Device().synchronize()
    with stream:
        captured, graph = capture(stream, step)
        for offsets, number in batches:
            cu_seqlens[...] = gpu.asarray(offsets, "int32")
            seed[...] = number
            graph.launch(stream)
            stream.synchronize()
            for result, expected in zip(captured, step(), strict=True):
                stream.synchronize()
                assert_same_bits(result, expected)


def test_lengths_are_clamped_on_the_device(gpu: Any) -> None:
    """Offsets that lead outside of the arrays give nonsense, but touch nothing beyond them."""
    parent = gpu.full((4, 3 * 128, 2, 64), np.nan, "float16")
    parent[:, 128:256] = 1.0
    q, k, v, out = (x[128:256] for x in parent)
    for offsets in ((0, 1000, 2000), (-5, 64, 128), (128, 64, 0), (0, 2**31 - 1, -(2**31))):
        cu_seqlens = gpu.asarray(offsets, "int64").astype("int32")
        cuflash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, out=out)
        assert np.isnan(gpu.asnumpy(parent[:, :128])).all()
        assert np.isnan(gpu.asnumpy(parent[:, 256:])).all()
        assert not np.isnan(gpu.asnumpy(parent[:3, 128:256])).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_variants_give_the_same_bits_again(gpu: Any, kernel: str) -> None:
    """Races of the tiles of bias and mask, and of the gradients that are summed over shared axes."""
    q, k, v, dout = (normal(gpu, (2, 4, 517, 64), "float16", seed) for seed in range(4))
    options = {
        "causal": True,
        "bias": normal(gpu, (4, 517, 517), "float16", 5),
        "mask": gpu.random.default_rng(6).random((517, 517)) < 0.7,
        "sinks": gpu.zeros(4, "float32"),
        "softcap": 5.0,
        "dropout_p": 0.2,
        "seed": 7,
        "kernel": kernel,
    }
    first = None
    differing = gpu.zeros((), "int64")
    for _ in range(100):
        out, vjp = cuflash.attention_vjp(q, k, v, **options, return_dbias=True, return_dsinks=True, deterministic=True)
        bits = [x.view("uint16" if x.itemsize == 2 else "uint32") for x in (out, *vjp(dout))]
        first = first or bits
        for x, y in zip(bits, first, strict=True):
            differing += (x != y).sum()
    assert int(differing) == 0


@pytest.mark.parametrize("kernel", ["auto", "sm80", "wmma"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_of_a_bias_of_more_tiles_than_fit_the_gpu(
    gpu: Any, kernel: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks stay, for whatever tiles come next."""
    monkeypatch.setattr(_dbias, "MIN_TILES", 1)
    if kernel != "auto":  # else a Hopper GPU has one kernel for all
        monkeypatch.setattr(_dbias, "SM90_TILES", ())
    shapes = ((2, 24, 401, 64), (2, 12, 385, 64), (2, 12, 385, 64))  # of 24 x 4 x 4 tiles of the gradient
    problem = AttentionProblem(*shapes, "float16", causal=causal, bias=PairArray((24, 401, 385)))
    arrays, bias = problem.arrays(gpu), gpu.asarray(problem.options["bias"])
    _, vjp = cuflash.attention_vjp(*arrays, causal=causal, bias=bias, kernel=kernel, return_dbias=True)
    dq, dk, dv, dbias = vjp(problem.dout(gpu))
    assert_gradients_accurate(problem.dout(), *problem.arrays(), dq, dk, dv, dbias=dbias, **problem.options)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_gradient_of_a_bias_gives_the_same_bits_again(gpu: Any, head_dim: int) -> None:
    """Races of blocks that load for each other: on a Hopper GPU two with neighbouring keys."""
    q, k, v, dout = (normal(gpu, (3, 8, 1000, head_dim), "float16", seed) for seed in range(4))
    bias = normal(gpu, (8, 1000, 1000), "float16", 5)
    _, vjp = cuflash.attention_vjp(q, k, v, bias=bias, return_dbias=True)
    first = vjp(dout)[3].view("uint16")
    assert not any(int((vjp(dout)[3].view("uint16") != first).sum()) for _ in range(50))


def test_variants_take_no_memory_of_the_size_of_the_scores(gpu: Any) -> None:
    pool = gpu.get_default_memory_pool()
    seqlen = 8192
    q, k, v, dout = (normal(gpu, (8, seqlen, 64), "float16", seed) for seed in range(4))
    bias = normal(gpu, (1, 1, seqlen), "float16", 4)
    options = {"bias": bias, "dropout_p": 0.1, "seed": 1, "softcap": 20.0, "sinks": gpu.zeros(8, "float32")}
    pool.free_all_blocks()
    before = pool.total_bytes()
    out, vjp = cuflash.attention_vjp(q, k, v, **options, return_dbias=True, return_dsinks=True)
    results = vjp(dout)
    workspace = 4 * 8 * (seqlen * (1 + floats_of_a_query(gpu)) + seqlen // 128)
    assert pool.total_bytes() - before <= sum(x.nbytes for x in (out, *results)) + workspace + 8192


@pytest.mark.parametrize(
    ("name", "expression", "about"),
    [
        ("score_mod", "score + unknown", "unknown"),
        ("mask_mod", "kv_idx <= ", "expression"),
        ("score_mod", "score + table(h)", "one index for each"),
    ],
)
def test_an_expression_that_does_not_compile_is_pointed_at(gpu: Any, name: str, expression: str, about: str) -> None:
    q = gpu.ones((2, 17, 64), "float16")
    args = {"table": gpu.ones((2, 17), "float32")} if "table" in expression else None
    with pytest.raises(ValueError, match=f"(?s){name}: {re.escape(repr(expression))} does not compile.*{about}"):
        cuflash.attention(q, q, q, mod_args=args, **{name: expression})


def test_the_second_device(gpu: Any) -> None:
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    arrays = [normal(gpu, (2, 129, 64), "float16", seed) for seed in range(3)]
    expected = cuflash.attention(*arrays)
    with gpu.cuda.Device(1):
        out = cuflash.attention(*(gpu.asarray(x) for x in arrays))
    assert out.device.id == 1
    assert_same_bits(gpu.asnumpy(out), gpu.asnumpy(expected))


@pytest.mark.parametrize(("dtype", "kernel"), kernels_of("float16", "bfloat16", "float32"))
def test_medium_sizes_are_accurate(gpu: Any, dtype: str, kernel: str) -> None:
    for head_dim in (64, 128):
        shapes = ((2, 4, 1000, head_dim), (2, 2, 1100, head_dim), (2, 2, 1100, head_dim))
        problem = AttentionProblem(*shapes, dtype, causal=True)
        arrays, dout = problem.arrays(gpu), problem.dout(gpu)
        out, lse = cuflash.attention(*arrays, causal=True, return_lse=True, kernel=kernel)
        assert_attention_accurate(*arrays, out, lse, causal=True)
        gradients = cuflash.attention_backward(dout, *arrays, out, lse, causal=True, kernel=kernel)
        assert_gradients_accurate(dout, *arrays, *gradients, causal=True)
