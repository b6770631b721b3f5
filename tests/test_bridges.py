"""The bridges of examples/: no copies, and gradients as good as the frameworks' own. Each needs its framework."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from tests.conftest import why_no_gpu
from tests.test_examples import run

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave GPU memory to the other tests

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = ["float32", "float16", "bfloat16"]
HEADS = {"q": 4, "k": 2, "v": 2, "dout": 4}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arrays that go into and come out of cuflash, from now on."""
    arrays: list[tuple[Any, ...]] = []

    def spy(function: Any) -> Any:
        def spied(*inputs: Any, **options: Any) -> Any:
            results = function(*inputs, **options)
            arrays.append((*inputs, *results))
            return results

        return spied

    for name in ("attention", "attention_backward", "attention_vjp"):
        monkeypatch.setattr(cuflash, name, spy(getattr(cuflash, name)))
    return arrays


def address(array: Any) -> int:
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


def asnumpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def assert_agree(ours: Any, theirs: Any, dtype: str) -> None:
    """Results agree but for roundings of this dtype: how accurate ours are is tested elsewhere."""
    ours, theirs = ([np.asarray(x, np.float64) for x in results] for results in (ours, theirs))
    tolerance = 8 * float(ml_dtypes.finfo(dtype).eps) * max(abs(x).max() for x in theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert abs(x - y).max() <= tolerance


@pytest.mark.parametrize("name", ["torch", "jax", "numba"])
def test_the_bridges_run_and_are_short(name: str) -> None:
    pytest.importorskip(name)
    example = f"{name}_bridge.py"
    errors = [float(error) for error in re.findall(r"differs.* by at most (\S+)", run(example))]
    assert len(errors) >= 3
    assert max(errors) < 1e-4
    assert len((Path(__file__).parents[1] / "examples" / example).read_text().splitlines()) <= 60


def torch_on(device: str) -> Any:
    torch = pytest.importorskip("torch")
    if device == "cuda" and (why_no_gpu() or not torch.cuda.is_available()):
        pytest.skip("needs a GPU that PyTorch and CuPy can use")
    return torch


@pytest.mark.parametrize("device", DEVICES)
def test_torch_gradients(device: str) -> None:
    torch = torch_on(device)
    from torch_bridge import Attention

    @settings(max_examples=25, derandomize=True, database=None, deadline=None)
    @given(
        dtype=st.sampled_from(DTYPES),
        heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
        seqlens=st.tuples(st.integers(1, 70), st.integers(1, 70)),
        causal=st.booleans(),
        scale=st.sampled_from([None, 0.2]),
        seed=st.integers(0, 1000),
    )
    def check(dtype: str, heads: Any, seqlens: Any, causal: bool, scale: float | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        (m, n), (hq, hkv) = seqlens, heads
        shapes = (2, m, hq, 32), (2, n, hkv, 32), (2, n, hkv, 16), (2, m, hq, 16)
        inputs = [torch.from_numpy(normal(rng, *shape)).to(device, getattr(torch, dtype)) for shape in shapes]

        def results(attend: Any, dtype: Any) -> list[np.ndarray]:
            *qkv, dout = (x.to(dtype).transpose(1, 2).detach().requires_grad_() for x in inputs)
            out = attend(*qkv)
            return [x.detach().double().cpu().numpy() for x in (out, *torch.autograd.grad(out, qkv, dout))]

        def theirs(q: Any, k: Any, v: Any) -> Any:
            k, v = (x.repeat_interleave(hq // hkv, dim=1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

        options = {"causal": causal and "top-left", "scale": scale}
        ours = results(lambda *qkv: Attention.apply(*qkv, options), inputs[0].dtype)
        assert_agree(ours, results(theirs, torch.float64), dtype)

    check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_copies_nothing(device: str, dtype: str, calls: list[tuple[Any, ...]]) -> None:
    torch = torch_on(device)
    from torch_bridge import Attention

    options = {"device": device, "dtype": getattr(torch, dtype)}
    q, k, v, dout = (torch.randn(2, 33, h, 32, **options).transpose(1, 2).requires_grad_() for h in HEADS.values())
    out = Attention.apply(q, k, v, {"causal": True})
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    (forward, backward) = calls
    assert [address(x) for x in forward[:4]] == [x.data_ptr() for x in (q, k, v, out)]
    assert [address(x) for x in backward[:5]] == [x.data_ptr() for x in (dout, q, k, v, out)]
    assert [address(x) for x in backward[6:]] == [x.data_ptr() for x in gradients]


def test_torch_gradients_have_no_gradients() -> None:
    torch = torch_on("cpu")
    from torch_bridge import Attention

    q = torch.randn(1, 5, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(Attention.apply(q, q, q, {}).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def jax_inputs(device: str, dtype: str) -> Any:
    """JAX, and q, k, v and dout on the device."""
    jax = pytest.importorskip("jax")
    try:
        target = jax.devices(device)[0]
    except RuntimeError:
        pytest.skip("needs a GPU that JAX and CuPy can use")
    if device == "cuda" and why_no_gpu():
        pytest.skip("needs a GPU that JAX and CuPy can use")
    rng = np.random.default_rng(0)
    arrays = (normal(rng, 2, 33, heads, 32).astype(dtype) for heads in HEADS.values())
    return jax, [jax.device_put(array, target) for array in arrays]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", ["jit", "eager", "vmap"])
@pytest.mark.parametrize("options", [{"causal": True}, {"scale": 0.2}], ids=str)
def test_jax_gradients(device: str, dtype: str, transform: str, options: dict[str, Any]) -> None:
    jax, (*qkv, dout) = jax_inputs(device, dtype)
    from jax_bridge import make_attention

    def results(attend: Any, *inputs: Any) -> Any:
        out, vjp = jax.vjp(attend, *inputs[:3])
        return out, *vjp(inputs[3])

    def theirs(*qkv: Any) -> Any:
        return jax.nn.dot_product_attention(*qkv, is_causal=options.get("causal", False), scale=options.get("scale"))

    attention = make_attention(**options)
    attend = {
        "jit": jax.jit(attention),
        "eager": attention,
        "vmap": lambda *qkv: jax.vmap(attention)(*(x[:, None] for x in qkv))[:, 0],
    }[transform]
    with jax.default_matmul_precision("highest"):
        expected = results(theirs, *(x.astype("float32") for x in (*qkv, dout)))
    assert_agree(results(attend, *qkv, dout), expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_jax_copies_no_input(device: str, dtype: str, jit: bool, calls: list[tuple[Any, ...]]) -> None:
    jax, (*qkv, dout) = jax_inputs(device, dtype)
    from jax_bridge import make_attention

    attention = make_attention(causal=True)
    out, vjp = jax.vjp(jax.jit(attention) if jit else attention, *qkv)
    jax.block_until_ready(vjp(dout))
    forward, backward = calls
    assert [address(x) for x in forward[:4]] == [x.unsafe_buffer_pointer() for x in (*qkv, out)]
    assert [address(x) for x in backward[:5]] == [x.unsafe_buffer_pointer() for x in (dout, *qkv, out)]


def rotated(x: np.ndarray, start: int, direction: int) -> np.ndarray:
    """Rotary embeddings once more, as a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = (start + np.arange(x.shape[1]))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * direction * angles)
    return np.concatenate([z.real, z.imag], axis=-1).astype(x.dtype)


def test_numba_pipeline(calls: list[tuple[Any, ...]]) -> None:
    pytest.importorskip("numba")
    from numba_bridge import attend, xp

    rng = np.random.default_rng(0)
    before, dout = normal(rng, 2, 37, 3, 4, 32), normal(rng, 2, 37, 4, 32)
    qkv = xp.array(before)  # a copy
    out, *gradients = attend(qkv, xp.asarray(dout), start=3)

    assert [address(x) - address(qkv) for x in calls[0][:3]] == [i * qkv.strides[2] for i in range(3)]
    after = asnumpy(qkv)
    for i, direction in enumerate((1, 1, 0)):
        np.testing.assert_allclose(after[:, :, i], rotated(before[:, :, i], 3, direction), atol=1e-5)
    arrays = [after[:, :, i] for i in range(3)]
    assert_attention_accurate(*arrays, asnumpy(out), causal=True, layout="bshd")
    turned_back = [rotated(asnumpy(x), 3, direction) for x, direction in zip(gradients, (1, 1, 0), strict=True)]
    assert_gradients_accurate(dout, *arrays, *turned_back, causal=True, layout="bshd")
