"""Bad input: each kind gets an error that names the argument, what it was and what is allowed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.conftest import Ring

SHAPE = (2, 4, 5, 8)  # batch, heads, sequence, head_dim


def arrays(ring: Ring, *shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    return [ring.asarray(np.ones(shape, dtype)) for shape in shapes or (SHAPE, SHAPE, SHAPE)]


def fails(ring: Ring, error: type[Exception], pattern: str, *inputs: Any, **options: Any) -> None:
    """Assert that attention and attention_vjp refuse a call alike."""
    options = {"kernel": ring.kernel} | options
    with pytest.raises(error, match=pattern):
        cuflash.attention(*inputs, **options)
    if "out" not in options:
        with pytest.raises(error, match=pattern):
            cuflash.attention_vjp(*inputs, **options)


class FakeTensor:
    """What cuflash sees of a ``torch.Tensor``."""

    __module__ = "torch"
    shape = SHAPE
    dtype = "torch.float32"
    ndim = 4

    def __dlpack__(self) -> Any:
        raise AssertionError("a tensor is not converted unasked")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor is not converted unasked")


FakeTensor.__qualname__ = FakeTensor.__name__ = "Tensor"


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([[1.0, 2.0]], "list"),
        (1.0, "float"),
        (None, "NoneType"),
        (np.ones((1, 2)).view(np.matrix), "matrix"),
        (np.ma.masked_array(np.ones(SHAPE)), "MaskedArray"),
    ],
)
def test_what_is_no_array(ring: Ring, index: int, value: Any, kind: str) -> None:
    inputs = arrays(ring)
    inputs[index] = value
    fails(ring, TypeError, rf"{'qkv'[index]}\b.*{kind}.*(cupy|numpy)\.ndarray", *inputs)


@pytest.mark.parametrize("index", range(3))
def test_a_torch_tensor_is_told_how_to_come_in(ring: Ring, index: int) -> None:
    inputs = arrays(ring)
    inputs[index] = FakeTensor()
    fails(ring, TypeError, rf"{'qkv'[index]}\b.*torch\.Tensor.*cupy\.from_dlpack\(x\)", *inputs)


def test_a_real_torch_tensor_is_told_how_to_come_in() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(SHAPE)
    with pytest.raises(TypeError, match=r"q\b.*torch\.Tensor.*cupy\.from_dlpack\(x\)"):
        cuflash.attention(x, x, x)


def test_numpy_and_cupy_do_not_mix(gpu: Any) -> None:
    x = np.ones(SHAPE, np.float32)
    for index in range(3):
        inputs = [x] * 3
        inputs[index] = gpu.asarray(x)
        with pytest.raises(TypeError, match=r"cupy\.ndarray.*numpy\.ndarray|numpy\.ndarray.*cupy\.ndarray"):
            cuflash.attention(*inputs)


def test_devices_do_not_mix(gpu: Any) -> None:
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    x = gpu.ones(SHAPE, "float32")
    with gpu.cuda.Device(1):
        y = gpu.ones(SHAPE, "float32")
    with pytest.raises(ValueError, match=r"k\b.*device 1.*device.* 0"):
        cuflash.attention(x, y, y)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float128", "uint8", "object"])
def test_dtypes_that_are_not_supported(ring: Ring, dtype: str) -> None:
    if ring.name == "gpu" and dtype in ("float128", "object"):
        pytest.skip("CuPy has no such arrays")
    inputs = arrays(ring, dtype=dtype)
    fails(ring, TypeError, rf"q\b.*{dtype}.*float16, bfloat16, float32", *inputs)


def test_float64_is_for_numpy_alone(ring: Ring) -> None:
    inputs = arrays(ring, dtype="float64")
    if ring.name == "numpy":
        assert cuflash.attention(*inputs).dtype == np.float64
    else:
        fails(ring, TypeError, r"q\b.*float64.*float16, bfloat16, float32", *inputs)


@pytest.mark.parametrize("index", [1, 2])
def test_mixed_dtypes(ring: Ring, index: int) -> None:
    inputs = arrays(ring)
    inputs[index] = inputs[index].astype("float16")
    fails(ring, TypeError, rf"{'qkv'[index]}\b.*float16.*q\b.*float32", *inputs)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("shape", [(), (8,), (1, 2, 4, 5, 8)])
def test_wrong_ranks(ring: Ring, index: int, shape: tuple[int, ...]) -> None:
    shapes = [SHAPE] * 3
    shapes[index] = shape
    fails(ring, ValueError, rf"{'qkv'[index]}\b.*{len(shape)} ax.*2.*3.*4", *arrays(ring, *shapes))


@pytest.mark.parametrize(
    ("shapes", "pattern"),
    [
        ((SHAPE, (2, 4, 5, 9), SHAPE), r"k\b.*head_dim.*9.*8"),
        ((SHAPE, SHAPE, (2, 4, 6, 8)), r"v\b.*6.*5"),
        ((SHAPE, (2, 2, 5, 8), SHAPE), r"v\b.*4.*heads.*2|v\b.*heads.*4.*2"),
        ((SHAPE, (2, 3, 5, 8), (2, 3, 5, 8)), r"q\b.*4.*multiple.*3"),
        ((SHAPE, (2, 8, 5, 8), (2, 8, 5, 8)), r"q\b.*4.*multiple.*8"),
        (((2, 0, 5, 8), SHAPE, SHAPE), r"q\b.*0.*multiple.*4"),
        ((SHAPE, (2, 0, 5, 8), (2, 0, 5, 8)), r"q\b.*4.*multiple.*0"),
        ((SHAPE, (3, 4, 5, 8), (3, 4, 5, 8)), r"q: 2.*k: 3.*v: 3"),
        ((SHAPE, SHAPE, (3, 4, 5, 8)), r"q: 2.*k: 2.*v: 3"),
        (((2, 4, 5, 0), (2, 4, 5, 0), SHAPE), r"q\b.*head_dim.*0.*1 to 256"),
        ((SHAPE, SHAPE, (2, 4, 5, 0)), r"v\b.*head_dim.*0.*1 to 256"),
        (((5, 257), (5, 257), (5, 8)), r"q\b.*head_dim.*257.*1 to 256"),
        (((5, 8), (5, 8), (5, 257)), r"v\b.*head_dim.*257.*1 to 256"),
    ],
)
def test_shapes_that_do_not_fit_together(ring: Ring, shapes: Any, pattern: str) -> None:
    fails(ring, ValueError, pattern, *arrays(ring, *shapes))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scale_must_be_finite(ring: Ring, scale: float) -> None:
    fails(ring, ValueError, rf"scale\b.*{scale}.*finite", *arrays(ring), scale=scale)


@pytest.mark.parametrize("scale", ["0.5", 1j, [0.5], np.ones(2), True])
def test_scale_must_be_a_number(ring: Ring, scale: Any) -> None:
    fails(ring, TypeError, r"scale\b.*number", *arrays(ring), scale=scale)


@pytest.mark.parametrize("causal", ["bottom", "Top-Left", 2, None, [True]])
def test_unknown_causal(ring: Ring, causal: Any) -> None:
    fails(ring, ValueError, r"causal\b.*True.*bottom-right.*top-left", *arrays(ring), causal=causal)


@pytest.mark.parametrize(
    "window_size",
    [5, (5,), (1, 2, 3), (-1, 0), (0, -1), (1.5, 0), (np.nan, 0), "ab", ("1", "2"), (True, False), {}],
)
def test_bad_windows(ring: Ring, window_size: Any) -> None:
    fails(
        ring,
        ValueError,
        r"window_size\b.*None.*\(left, right\).*>= 0",
        *arrays(ring),
        window_size=window_size,
    )


@pytest.mark.parametrize("layout", ["bsdh", "BHSD", None, 3, ["bhsd"]])
def test_unknown_layouts(ring: Ring, layout: Any) -> None:
    fails(ring, ValueError, r"layout\b.*'bhsd' and 'bshd'", *arrays(ring), layout=layout)


@pytest.mark.parametrize("kernel", ["fast", "", None, 90, ["auto"]])
def test_unknown_kernels(ring: Ring, kernel: Any) -> None:
    fails(ring, ValueError, r"kernel\b.*'auto', 'wmma'", *arrays(ring), kernel=kernel)


def test_a_kernel_that_does_not_compute_numpy_arrays() -> None:
    x = np.ones(SHAPE, np.float32)
    with pytest.raises(NotImplementedError, match=r"kernel='wmma'.*NumPy.*CuPy.*'auto'"):
        cuflash.attention(x, x, x, kernel="wmma")


@pytest.mark.host
def test_a_kernel_that_this_gpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash import _backends
    from cuflash._device import Chip
    from cuflash._launch import LaunchBackend
    from tests.hostcuda import HostDevice

    x = np.ones(SHAPE, np.float32)
    for capability, dtype in (((6, 1), "float16"), ((7, 5), "bfloat16"), ((7, 0), "float32")):
        device = HostDevice(chip=Chip("Old GPU", capability, 48 * 1024))
        monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(device))
        old = x.astype(dtype)
        pattern = rf"{dtype}.*Old GPU.*{capability[0]}\.{capability[1]}"
        for kernel in ("auto", "wmma"):
            with pytest.raises(NotImplementedError, match=pattern):
                cuflash.attention(old, old, old, kernel=kernel)


def test_options_of_later_versions_are_not_in_the_signature(ring: Ring) -> None:
    for option in ("mask", "bias", "softcap", "dropout_p"):
        fails(ring, TypeError, option, *arrays(ring), **{option: None})


def test_options_are_keywords_and_arrays_are_not(ring: Ring) -> None:
    q, k, v = arrays(ring)
    with pytest.raises(TypeError, match="positional"):
        cuflash.attention(q, k, v, 0.5)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        cuflash.attention(q=q, k=k, v=v)  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", [(4, 5, 8), (1, 4, 5, 8), (2, 4, 5, 9), (2, 5, 4, 8)])
def test_out_of_another_shape(ring: Ring, shape: tuple[int, ...]) -> None:
    (out,) = arrays(ring, shape)
    fails(ring, ValueError, r"out\b.*\(2, 4, 5, 8\)", *arrays(ring), out=out)


def test_out_of_another_dtype(ring: Ring) -> None:
    (out,) = arrays(ring, SHAPE, dtype="float16")
    fails(ring, TypeError, r"out\b.*float16.*float32", *arrays(ring), out=out)


def test_out_that_is_no_array(ring: Ring) -> None:
    fails(ring, TypeError, r"out\b.*list.*ndarray", *arrays(ring), out=[[1.0]])


@pytest.mark.parametrize("index", range(3))
def test_out_that_overlaps_an_input(ring: Ring, index: int) -> None:
    inputs = arrays(ring)
    fails(ring, ValueError, rf"out\b.*overlaps {'qkv'[index]}\b", *inputs, out=inputs[index])
    parent = ring.asarray(np.ones((3, 4, 5, 8), np.float32))
    inputs[index] = parent[:2]
    fails(ring, ValueError, rf"out\b.*overlaps {'qkv'[index]}\b", *inputs, out=parent[1:])


def test_out_that_overlaps_itself(ring: Ring) -> None:
    out = ring.xp.broadcast_to(ring.asarray(np.ones((1, 4, 5, 8), np.float32)), SHAPE)
    out = (
        np.lib.stride_tricks.as_strided(np.ones((4, 5, 8), np.float32), SHAPE, (0, 160, 32, 4))
        if ring.xp is np
        else out
    )
    fails(ring, ValueError, r"out\b.*strides.*one place", *arrays(ring), out=out)


def test_out_that_is_read_only() -> None:
    x = np.ones(SHAPE, np.float32)
    out = np.empty_like(x)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out\b.*read-only"):
        cuflash.attention(x, x, x, out=out)


def test_a_refused_call_leaves_out_alone(ring: Ring) -> None:
    q, k, v = arrays(ring)
    out = ring.asarray(np.full(SHAPE, 7, np.float32))
    with pytest.raises(ValueError, match="window_size"):
        cuflash.attention(q, k, v, out=out, window_size=(-1, 0))
    assert (ring.numpy(out) == 7).all()


NAMES = ("dout", "q", "k", "v", "out", "lse")


def backward_arguments(ring: Ring) -> dict[str, Any]:
    return dict(zip(NAMES, arrays(ring, SHAPE, SHAPE, SHAPE, SHAPE, SHAPE, SHAPE[:3]), strict=True))


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        (lambda x: x[:1], ValueError, r"{name}\b.*\(1, 4, 5.*\(2, 4, 5"),
        (lambda x: x[0], ValueError, r"{name}\b.*\(4, 5.*\(2, 4, 5"),
        (lambda x: x.astype("float16"), TypeError, r"{name}\b.*float16.*float32"),
        (lambda x: x.tolist(), TypeError, r"{name}\b.*list.*ndarray"),
    ],
)
def test_bad_arguments_of_the_backward_pass(ring: Ring, name: str, change: Any, error: Any, pattern: str) -> None:
    arguments = backward_arguments(ring)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=pattern.replace("{name}", name)):
        cuflash.attention_backward(*arguments.values(), kernel=ring.kernel)


def test_the_backward_pass_checks_its_options(ring: Ring) -> None:
    arguments = backward_arguments(ring).values()
    for options, pattern in (
        ({"scale": np.nan}, "scale"),
        ({"window_size": (-1, 0)}, "window_size"),
        ({"causal": "left"}, "causal"),
        ({"layout": "sbhd"}, "layout"),
        ({"kernel": "fast"}, "kernel"),
    ):
        with pytest.raises(ValueError, match=pattern):
            cuflash.attention_backward(*arguments, **options)
    with pytest.raises(TypeError, match=r"deterministic\b.*True and False"):
        cuflash.attention_backward(*arguments, kernel=ring.kernel, deterministic="yes")


def test_a_wrong_gradient_is_refused_by_the_vjp(ring: Ring) -> None:
    out, vjp = cuflash.attention_vjp(*arrays(ring), kernel=ring.kernel)
    with pytest.raises(ValueError, match=r"dout\b"):
        vjp(out[:1])


@pytest.mark.skipif(sys.byteorder != "little", reason="the other byte order is big")
def test_the_other_byte_order(ring: Ring) -> None:
    if ring.name == "gpu":
        pytest.skip("CuPy has no such arrays")
    inputs = [x.astype(">f4") for x in arrays(ring)]
    fails(ring, TypeError, r"q\b.*>f4", *inputs)


def test_strides_that_are_no_multiples_of_the_elements(ring: Ring) -> None:
    if ring.name == "gpu":
        pytest.skip("CuPy has no such arrays")
    records = np.zeros((2, 5, 8), [("x", np.float32), ("y", np.int8)])
    x = np.ones((2, 5, 8), np.float32)
    fails(ring, ValueError, r"k\b.*strides", x, records["x"], x)
    fails(ring, ValueError, r"out\b.*strides", x, x, x, out=records["x"])
    assert not records["y"].any()


def test_an_address_between_elements(gpu: Any) -> None:
    memory = gpu.zeros(4 * 40 + 1, np.uint8)
    x = gpu.ones((5, 8), np.float32)
    with pytest.raises(ValueError, match=r"k\b.*address"):
        cuflash.attention(x, memory[1:].view(np.float32).reshape(5, 8), x)


def test_what_was_right_before_makes_nothing_else_right(ring: Ring) -> None:
    """Plans are kept by options; True and 1, equal in a dict, are not the same to the checks."""
    inputs = arrays(ring)
    ring.attention(*inputs, window_size=(1, 0))
    for window in ((True, 0), (1.0, 0), (1, False)):
        fails(ring, ValueError, r"window_size\b", *inputs, window_size=window)
    ring.attention(*inputs, causal=True)
    fails(ring, ValueError, r"causal\b", *inputs, causal=1)


@pytest.mark.parametrize("scale", [1e39, -1e300, 10**400])
def test_a_scale_that_float32_cannot_hold(ring: Ring, scale: float) -> None:
    fails(ring, ValueError, r"scale\b.*3\.403e\+38", *arrays(ring), scale=scale)


def test_flags_are_flags(ring: Ring) -> None:
    with pytest.raises(TypeError, match=r"return_lse\b.*'no'"):
        ring.attention(*arrays(ring), return_lse="no")
    with pytest.raises(TypeError, match=r"deterministic\b.*'yes'"):
        ring.attention_vjp(*arrays(ring), deterministic="yes")


def test_out_that_overlaps_itself_or_has_no_elements(ring: Ring) -> None:
    q, k, v = arrays(ring)
    empty = q[..., :0, :]
    assert ring.attention(empty, k, v, out=ring.xp.empty_like(empty)).size == 0
    memory = ring.xp.zeros(4 * q.size, q.dtype)
    strides = (*q.strides[:-2], q.strides[-2], q.itemsize // 2)
    overlapping = ring.xp.lib.stride_tricks.as_strided(memory, q.shape, strides)
    with pytest.raises(ValueError, match=r"out\b.*strides"):
        ring.attention(q, k, v, out=overlapping)
