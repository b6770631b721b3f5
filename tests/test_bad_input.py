"""Bad input: each kind gets an error that names the argument, what it was and what is allowed."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
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


def test_none_is_no_array_with_options_either(ring: Ring) -> None:
    mask = ring.asarray(np.ones((5, 5), bool))
    for index, name in enumerate("qkv"):
        inputs = arrays(ring)
        inputs[index] = None
        fails(ring, TypeError, rf"{name}\b.*NoneType.*ndarray", *inputs, mask=mask)
    for name in NAMES:
        arguments = backward_arguments(ring) | {name: None}
        with pytest.raises(TypeError, match=rf"{name}\b.*NoneType.*ndarray"):
            cuflash.attention_backward(*arguments.values(), kernel=ring.kernel, mask=mask)


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


def test_short_floats_of_numpy_meet_the_same_limits(ring: Ring) -> None:
    fails(ring, ValueError, r"scale\b.*finite", *arrays(ring), scale=np.float16(np.inf))
    for softcap in (0, np.inf):
        fails(ring, ValueError, r"softcap\b.*> 0", *arrays(ring), softcap=np.float16(softcap))
    inputs = arrays(ring)
    short = ring.attention(*inputs, scale=np.float16(0.5), softcap=np.float16(30))  # a warning would be an error
    np.testing.assert_array_equal(ring.numpy(short), ring.numpy(ring.attention(*inputs, scale=0.5, softcap=30)))


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
    fails(ring, ValueError, r"kernel\b.*'auto', 'sm90', 'sm80', 'wmma'", *arrays(ring), kernel=kernel)


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


def test_options_that_there_are_not(ring: Ring) -> None:
    for option in ("attn_mask", "softmax_scale", "cu_seqlens_q", "is_causal"):
        fails(ring, TypeError, option, *arrays(ring), **{option: None})
    with pytest.raises(TypeError, match=r"out\b.*vjp"):
        cuflash.attention_vjp(*arrays(ring), out=arrays(ring)[0])


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
    for name in ("deterministic", "return_dbias", "return_dsinks"):
        with pytest.raises(TypeError, match=rf"^{name}\b.*\[\].*True and False"):
            cuflash.attention_backward(*arguments, kernel=ring.kernel, **{name: []})


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


@pytest.mark.parametrize("name", ["bias", "mask", "alibi_slopes", "sinks"])
@pytest.mark.parametrize("value", [0, 1, True, {}, 1.5])
def test_what_should_be_an_array_is_named(ring: Ring, name: str, value: Any) -> None:
    fails(ring, TypeError, rf"{name}\b.*allowed are cupy.ndarray and numpy.ndarray", *arrays(ring), **{name: value})


def test_a_block_mask_is_no_array(ring: Ring) -> None:
    block_mask = cuflash.BlockMask.from_blocks(ring.asarray(np.ones((1, 1), bool)), shape=(5, 5))
    for name in ("mask", "bias", "alibi_slopes", "sinks"):
        fails(ring, TypeError, rf"{name}\b.*BlockMask; allowed are cupy.ndarray", *arrays(ring), **{name: block_mask})


@pytest.mark.parametrize("softcap", [0, 0.0, -1, np.nan, np.inf, 1e-40, 1e35, 10**400])
def test_softcap_must_be_positive(ring: Ring, softcap: float) -> None:
    fails(ring, ValueError, r"softcap\b.*None.*> 0", *arrays(ring), softcap=softcap)


@pytest.mark.parametrize("softcap", ["30", True, [30.0], 1j])
def test_softcap_must_be_a_number(ring: Ring, softcap: Any) -> None:
    fails(ring, TypeError, r"softcap\b.*number", *arrays(ring), softcap=softcap)


@pytest.mark.parametrize(
    ("dropout_p", "error"),
    [(1, ValueError), (-0.1, ValueError), (np.nan, ValueError), (1.5, ValueError)]
    + [(value, TypeError) for value in (None, "0.5", True, [0.1])],
)
def test_dropout_p_is_a_probability_below_1(ring: Ring, dropout_p: Any, error: type[Exception]) -> None:
    fails(ring, error, r"dropout_p\b.*\[0, 1\)", *arrays(ring), dropout_p=dropout_p, seed=0)


def test_dropout_needs_a_seed(ring: Ring) -> None:
    fails(ring, ValueError, r"seed\b.*None.*dropout_p=0.1.*int.*uint64", *arrays(ring), dropout_p=0.1)


@pytest.mark.parametrize(
    ("seed", "error", "pattern"),
    [
        (-1, ValueError, r"-1.*2\*\*64"),
        (2**64, ValueError, r"18446744073709551616.*2\*\*64"),
        (1.0, TypeError, "float"),
        (True, TypeError, "bool"),
        ("7", TypeError, "str"),
        (np.zeros(1, np.int64), TypeError, "int64.*uint64"),
        (np.zeros(2, np.uint64), ValueError, r"\(2,\).*one element"),
        (np.zeros(0, np.uint64), ValueError, r"\(0,\).*one element"),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_bad_seeds(ring: Ring, seed: Any, error: type[Exception], pattern: str, dropout_p: float) -> None:
    if isinstance(seed, np.ndarray):
        seed = ring.asarray(seed)
    fails(ring, error, rf"seed\b.*{pattern}", *arrays(ring), seed=seed, dropout_p=dropout_p)


@pytest.mark.parametrize(
    "shape", [(4, 5, 6), (2, 4, 1, 5, 5), (3, 1, 5, 5), (2, 2, 5, 5), (4,), (5, 4), (1, 1, 1, 1, 1), (0, 4, 5, 5)]
)
@pytest.mark.parametrize(("name", "dtype"), [("bias", "float32"), ("mask", "bool")])
def test_bias_and_mask_must_broadcast(ring: Ring, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    given = ring.asarray(np.ones(shape, dtype))
    printed = str(shape).replace("(", r"\(").replace(")", r"\)")
    fails(ring, ValueError, rf"{name}\b.*{printed}.*\(2, 4, 5, 5\)", *arrays(ring), **{name: given})


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_bias_and_mask_are_batch_heads_queries_keys_in_every_layout(ring: Ring, layout: str) -> None:
    inputs = arrays(ring, (2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8))
    if layout == "bshd":
        inputs = arrays(ring, (2, 5, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8))
    bias = ring.asarray(np.ones((5, 4, 6), np.float32))
    fails(ring, ValueError, r"bias\b.*\(5, 4, 6\).*\(2, 4, 5, 6\)", *inputs, bias=bias, layout=layout)


def test_wrong_shapes_of_slopes_and_sinks(ring: Ring) -> None:
    for name, shapes in (("alibi_slopes", [(2,), (2, 2), (4, 2), (2, 4, 1), ()]), ("sinks", [(2,), (2, 4), (1,)])):
        for shape in shapes:
            given = ring.asarray(np.ones(shape, np.float32))
            fails(ring, ValueError, rf"{name}\b.*shape.*\(4,\)", *arrays(ring), **{name: given})


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "allowed"),
    [
        ("bias", (5, 5), "float64", "float16 and float32"),
        ("bias", (5, 5), "bfloat16", "float16 and float32"),
        ("bias", (5, 5), "bool", "float16 and float32"),
        ("mask", (5, 5), "float16", "bool"),
        ("mask", (5, 5), "uint8", "bool"),
        ("alibi_slopes", (4,), "float16", "float32"),
        ("sinks", (4,), "int32", "float16 and float32"),
    ],
)
def test_wrong_dtypes_of_options(ring: Ring, name: str, shape: Any, dtype: str, allowed: str) -> None:
    given = ring.asarray(np.ones(shape, dtype))
    fails(ring, TypeError, rf"{name}\b.*{dtype}.*{allowed}$", *arrays(ring, dtype="float16"), **{name: given})


@pytest.mark.parametrize("name", ["bias", "mask", "alibi_slopes", "sinks"])
@pytest.mark.parametrize("value", [[1.0], 1.0, FakeTensor()])
def test_options_that_are_no_arrays(ring: Ring, name: str, value: Any) -> None:
    fails(ring, TypeError, rf"{name}\b.*{type(value).__qualname__}.*ndarray", *arrays(ring), **{name: value})


@pytest.mark.parametrize("name", ["bias", "mask", "seed", "sinks"])
def test_numpy_and_cupy_do_not_mix_in_options(gpu: Any, name: str) -> None:
    q, k, v = (gpu.ones(SHAPE, "float32") for _ in range(3))
    with pytest.raises(TypeError, match=rf"{name}\b.*numpy\.ndarray.*q\b.*cupy\.ndarray"):
        cuflash.attention(q, k, v, **{name: np.ones(4)})


def test_a_block_mask_is_a_block_mask(ring: Ring) -> None:
    fails(ring, TypeError, r"block_mask\b.*ndarray.*make_block_mask", *arrays(ring), block_mask=arrays(ring)[0])


@pytest.mark.parametrize("name", ["mask", "mask_mod"])
def test_a_block_mask_without_what_it_was_made_of(ring: Ring, name: str) -> None:
    """Alone it would show all pairs of blocks that are seen in part."""
    mask_mod = (lambda score, b, h, i, j: j <= i) if ring.name == "numpy" else "kv_idx <= q_idx"
    made_of: Any = {"mask": ring.asarray(np.eye(5, dtype=bool)), "mask_mod": mask_mod}[name]
    block_mask = cuflash.make_block_mask(**{name: made_of}, shape=(1, 1, 5, 5))
    fails(ring, ValueError, rf"{name}: got None.*made of a {name}", *arrays(ring), block_mask=block_mask)


@pytest.mark.parametrize(
    ("blocks", "shape", "pattern"),
    [
        ((1, 1, 1, 2), (5, 129), r"\(5, 129\).*\(5, 5\)"),
        ((3, 1, 1, 1), (5, 5), r"\(3, 1, 1, 1\).*\(2, 4, 1, 1\)"),
        ((2, 2, 1, 1), (5, 5), r"\(2, 2, 1, 1\).*\(2, 4, 1, 1\)"),
    ],
)
def test_block_masks_of_other_calls(ring: Ring, blocks: Any, shape: Any, pattern: str) -> None:
    block_mask = cuflash.BlockMask.from_blocks(ring.asarray(np.ones(blocks, bool)), shape=shape)
    fails(ring, ValueError, rf"block_mask\b.*{pattern}", *arrays(ring), block_mask=block_mask)


def test_out_that_overlaps_an_option(ring: Ring) -> None:
    memory = ring.asarray(np.zeros((2, 4, 5, 8), np.float32))
    fails(ring, ValueError, r"out\b.*overlaps bias\b", *arrays(ring), out=memory, bias=memory[..., :5])


def test_expressions_are_for_kernels_and_callables_for_numpy(ring: Ring) -> None:
    allowed, refused = "callable", "score * 2"
    if ring.name != "numpy":
        allowed, refused = "str", lambda score, b, h, i, j: score
    for name in ("score_mod", "mask_mod"):
        for value in (refused, 1.0, arrays(ring)[0]):
            fails(ring, TypeError, rf"{name}\b.*allowed.*{allowed}", *arrays(ring), **{name: value})


@pytest.mark.host
@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"score_mod": " "}, ValueError, r"score_mod\b.*expression"),
        ({"mask_mod": ""}, ValueError, r"mask_mod\b.*expression"),
        ({"mod_args": {"a": 1}}, ValueError, r"mod_args\b.*'a'.*score_mod.*mask_mod"),
        ({"score_mod": "score + aa", "mod_args": {"a": 1}}, ValueError, r"mod_args\b.*'a'"),
        ({"score_mod": "score + a", "mod_args": [1]}, TypeError, r"mod_args\b.*dict"),
        ({"score_mod": "score", "mod_args": {"score": 1}}, ValueError, r"mod_args\b.*'score'.*taken"),
        ({"score_mod": "score", "mod_args": {"INFINITY": 1}}, ValueError, r"mod_args\b.*'INFINITY'.*taken"),
        ({"score_mod": "score", "mod_args": {"float": 1}}, ValueError, r"mod_args\b.*'float'.*taken"),
        ({"score_mod": "score", "mod_args": {"a b": 1}}, ValueError, r"mod_args\b.*'a b'.*letters"),
        ({"score_mod": "score", "mod_args": {"_a": 1}}, ValueError, r"mod_args\b.*'_a'.*letters"),
        ({"score_mod": "score", "mod_args": {3: 1}}, ValueError, r"mod_args\b.*3.*letters"),
        ({"score_mod": "score + a", "mod_args": {"a": 2**31}}, ValueError, r"mod_args\['a'\].*2147483648.*32 bits"),
        ({"score_mod": "score + a", "mod_args": {"a": "1"}}, TypeError, r"mod_args\['a'\].*str.*ndarray"),
        ({"score_mod": "score + a", "mod_args": {"a": np.ones(())}}, ValueError, r"mod_args\['a'\].*0 axes.*1 to 4"),
        ({"score_mod": "score + a", "mod_args": {"a": np.ones(1, "c8")}}, TypeError, r"mod_args\['a'\].*complex64"),
    ],
)
def test_bad_expressions(request: pytest.FixtureRequest, options: Any, error: type[Exception], pattern: str) -> None:
    from cuflash import _backends
    from tests.conftest import host_backend

    request.getfixturevalue("monkeypatch").setattr(_backends, "numpy_backend", host_backend())
    x = np.ones(SHAPE, np.float32)
    with pytest.raises(error, match=pattern):
        cuflash.attention(x, x, x, **options)


@pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
def test_callables_take_five_arguments(name: str) -> None:
    x = np.ones(SHAPE, np.float32)
    refused: list[Callable[..., Any]] = [lambda score: score, lambda a, b, c, d, e, f: a, lambda *, score: score]
    for value in refused:
        with pytest.raises(TypeError, match=rf"{name}\b.*5 arguments.*kv_idx"):
            cuflash.attention(x, x, x, **{name: value})
    cuflash.attention(x, x, x, **{name: lambda *names: names[3] >= names[4]})
    cuflash.attention(x, x, x, **{name: np.vectorize(lambda score, b, h, i, j: j <= i)})


def test_mod_args_are_not_for_callables() -> None:
    x = np.ones(SHAPE, np.float32)
    with pytest.raises(ValueError, match=r"mod_args\b.*table.*CUDA C\+\+"):
        cuflash.attention(x, x, x, score_mod=lambda score, b, h, i, j: score, mod_args={"table": x})


def test_gradients_of_what_there_is_not(ring: Ring) -> None:
    arguments = backward_arguments(ring).values()
    for name in ("bias", "sinks"):
        with pytest.raises(ValueError, match=rf"return_d{name}\b.*True.*{name} is None"):
            cuflash.attention_backward(*arguments, kernel=ring.kernel, **{f"return_d{name}": True})
        with pytest.raises(ValueError, match=rf"return_d{name}\b.*True.*{name} is None"):
            ring.attention_vjp(*arrays(ring), **{f"return_d{name}": True})
        with pytest.raises(TypeError, match=rf"return_d{name}\b.*'yes'"):
            ring.attention_vjp(*arrays(ring), **{f"return_d{name}": "yes"})


@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        (lambda x: x[:1], ValueError, r"dlse\b.*\(1, 4, 5\).*\(2, 4, 5\)"),
        (lambda x: x.astype("float16"), TypeError, r"dlse\b.*float16.*float32"),
        (lambda x: x.tolist(), TypeError, r"dlse\b.*list.*ndarray"),
    ],
)
def test_bad_gradients_of_lse(ring: Ring, change: Any, error: type[Exception], pattern: str) -> None:
    arguments = backward_arguments(ring)
    with pytest.raises(error, match=pattern):
        cuflash.attention_backward(*arguments.values(), kernel=ring.kernel, dlse=change(arguments["lse"]))


def packed(ring: Ring, lengths_q: Any = (0, 3, 7), lengths_k: Any = (0, 4, 9)) -> list[Any]:
    offsets = (ring.asarray(np.array(lengths, np.int32)) for lengths in (lengths_q, lengths_k))
    return [*arrays(ring, (7, 4, 8), (9, 2, 8), (9, 2, 8)), *offsets]


def fails_packed(ring: Ring, error: type[Exception], pattern: str, *inputs: Any, **options: Any) -> None:
    for function in (cuflash.attention_varlen, cuflash.attention_varlen_vjp):
        with pytest.raises(error, match=pattern):
            function(*inputs, kernel=ring.kernel, **options)


def test_packed_arrays_have_three_axes(ring: Ring) -> None:
    for index, name in enumerate("qkv"):
        inputs = packed(ring)
        inputs[index] = inputs[index][None]
        fails_packed(ring, ValueError, rf"{name}\b.*4 axes.*3: \(total, heads, head_dim\)", *inputs)


def test_packed_sequences_have_offsets(ring: Ring) -> None:
    for index, name in enumerate(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")):
        inputs = packed(ring)
        inputs[index] = None
        fails_packed(ring, TypeError, rf"{name}\b.*NoneType.*ndarray", *inputs)
    fails_packed(ring, TypeError, r"cu_seqlens_q\b.*NoneType.*ndarray", *packed(ring)[:3], None, None)
    q, k, v, *_ = packed(ring)
    lse = ring.asarray(np.ones((4, 7), np.float32))
    with pytest.raises(TypeError, match=r"cu_seqlens_q\b.*NoneType.*ndarray"):
        cuflash.attention_varlen_backward(q, q, k, v, q, lse, None, None, kernel=ring.kernel)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_k"])
@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        (lambda x: x.astype("int64"), TypeError, "int64.*int32"),
        (lambda x: x[None], ValueError, r"shape.*\(1, \d\)"),
        (lambda x: x.repeat(2)[::2], ValueError, r"strides.*contiguous"),
        (lambda x: x.tolist(), TypeError, "list.*ndarray"),
    ],
)
def test_bad_arrays_of_lengths(ring: Ring, name: str, change: Any, error: type[Exception], pattern: str) -> None:
    q, k, v, *offsets = packed(ring)
    given = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1], "seqused_k": ring.asarray(np.ones(2, np.int32))}
    given[name] = change(given[name])
    seqused_k = given.pop("seqused_k")
    fails_packed(ring, error, rf"{name}\b.*{pattern}", q, k, v, *given.values(), seqused_k=seqused_k)


def test_numbers_of_sequences_must_agree(ring: Ring) -> None:
    fails_packed(ring, ValueError, r"cu_seqlens_k\b.*\(2,\).*\(3,\)", *packed(ring, lengths_k=(0, 9)))
    seqused_k = ring.asarray(np.ones(3, np.int32))
    fails_packed(ring, ValueError, r"seqused_k\b.*\(3,\).*\(2,\)", *packed(ring), seqused_k=seqused_k)


@pytest.mark.parametrize(("name", "index", "total"), [("cu_seqlens_q", 3, 7), ("cu_seqlens_k", 4, 9)])
@pytest.mark.parametrize(
    ("values", "wrong", "least", "most"),
    [
        ((1, 3, 7), 0, 0, 0),
        ((0, 5, 4), 2, 5, None),
        ((0, 3, 10), 2, 3, None),
        ((0, -1, 7), 1, 0, None),
        ((0, 2**31 - 1, -(2**31)), 1, 0, None),
    ],
)
def test_offsets_of_numpy_arrays_are_checked(
    name: str, index: int, total: int, values: tuple[int, ...], wrong: int, least: int, most: int | None
) -> None:
    inputs = [np.ones((7, 4, 8)), *np.ones((2, 9, 2, 8)), *(np.array(x, np.int32) for x in ((0, 3, 7), (0, 4, 9)))]
    inputs[index] = np.array(values, np.int32)
    rule = rf"where {least} to {total if most is None else most} are allowed.*at most at {total}"
    with pytest.raises(ValueError, match=rf"{name}: got {values[wrong]} at index {wrong}, {rule}"):
        cuflash.attention_varlen(*inputs)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_limits_are_compared_with_numbers_of_small_dtypes(dtype: str, recwarn: pytest.WarningsRecorder) -> None:
    x = np.ones((3, 8), dtype)
    for option in ("scale", "softcap"):
        expected = cuflash.attention(x, x, x, **{option: 0.5})
        for number in (np.float16(0.5), np.float32(0.5), np.float64(0.5)):
            np.testing.assert_array_equal(cuflash.attention(x, x, x, **{option: number}), expected)
    assert not recwarn


def test_a_message_tells_one_of_many_offsets() -> None:
    offsets = np.arange(10_001, dtype=np.int32)
    offsets[5000:] -= 2
    with pytest.raises(ValueError, match="got 4998 at index 5000, where 4999 to 10000 are allowed") as error:
        cuflash.attention_varlen(*np.ones((3, 10_000, 1, 1)), offsets, offsets)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("values", "wrong"), [((5, 5), 0), ((-1, 5), 0), ((4, 6), 1)])
def test_used_lengths_of_numpy_arrays_are_checked(values: tuple[int, int], wrong: int) -> None:
    inputs = [np.ones((7, 4, 8)), *np.ones((2, 9, 2, 8)), *(np.array(x, np.int32) for x in ((0, 3, 7), (0, 4, 9)))]
    allowed = f"where 0 to {(4, 5)[wrong]} are allowed"
    with pytest.raises(ValueError, match=rf"seqused_k: got {values[wrong]} at index {wrong}, {allowed}"):
        cuflash.attention_varlen(*inputs, seqused_k=np.array(values, np.int32))


def test_a_callable_and_its_arrays_are_not_kept() -> None:
    x = np.ones((5, 8))

    class Score:
        def __call__(self, score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return score

    score = Score()
    gone = weakref.ref(score)
    cuflash.attention(x, x, x, score_mod=score)
    del score
    gc.collect()
    assert gone() is None
