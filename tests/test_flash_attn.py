"""cuflash.flash_attn: flash-attn's and torch's calls mean what they mean there."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import flash_attn
from cuflash.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    manual_seed,
    pad_input,
    scaled_dot_product_attention,
    unpad_input,
)
from cuflash.testing import assert_attention_accurate, reference_attention

# Copied from flash-attn 2.8.3 and torch 2.13.
FLASH_OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {FLASH_OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {FLASH_OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {FLASH_OPTIONS}",
    "flash_attn_varlen_func": (
        f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {FLASH_OPTIONS}, block_table=None"
    ),
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {FLASH_OPTIONS}",
    "flash_attn_varlen_kvpacked_func": (
        f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {FLASH_OPTIONS}"
    ),
    "scaled_dot_product_attention": (
        "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False"
    ),
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "pad_input": "hidden_states, indices, batch, seqlen",
}
SEED = 5
SEQLENS = [(113, 203), (128, 217), (113, 211), (108, 256), (64, 128), (65, 64), (1, 37), (37, 1), (129, 129)]


def normal(*shape: int, dtype: Any = "float32", seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def seed_of_the_next_call() -> int:
    """The dropout seed that a call will take if it is the first after manual_seed(SEED)."""
    return int(np.random.default_rng(SEED).integers(2**64, dtype=np.uint64))


def same_bits(actual: Any, expected: Any) -> None:
    if isinstance(actual, tuple):
        for x, y in zip(actual, expected, strict=True):
            same_bits(x, y)
    elif actual is not None or expected is not None:
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_peers(name: str) -> None:
    def bare(signature: inspect.Signature) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    peer = eval(f"lambda {SIGNATURES[name]}: None")
    assert bare(inspect.signature(getattr(flash_attn, name))) == bare(inspect.signature(peer))
    assert set(flash_attn.__all__) == {*SIGNATURES, "manual_seed"}


class Call:
    """A call of flash_attn_func, its arguments in flash-attn's terms, and the same in cuflash's."""

    def __init__(
        self,
        seqlens: tuple[int, int],
        heads: tuple[int, int],
        head_dim: int,
        dtype: str,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi: int,
        dropout_p: float,
        softmax_scale: float | None,
    ) -> None:
        batch, (seqlen_q, seqlen_k), (nheads, nheads_k) = 2, seqlens, heads
        self.arrays = (
            normal(batch, seqlen_q, nheads, head_dim, dtype=dtype, seed=1),
            normal(batch, seqlen_k, nheads_k, head_dim, dtype=dtype, seed=2),
            normal(batch, seqlen_k, nheads_k, head_dim, dtype=dtype, seed=3),
        )
        slopes = {0: None, 1: normal(nheads, seed=4) ** 2, 2: normal(batch, nheads, seed=4) ** 2}[alibi]
        self.options = {
            "dropout_p": dropout_p,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
            "alibi_slopes": slopes,
        }
        left, right = (None if side < 0 else side for side in window_size)
        self.ours: dict[str, Any] = {"causal": causal, "window_size": (left, right), "scale": softmax_scale}
        if softcap > 0:
            self.ours["softcap"] = softcap
        if slopes is not None:
            self.ours["alibi_slopes"] = slopes
        if dropout_p:
            self.ours |= {"dropout_p": dropout_p, "seed": seed_of_the_next_call()}

    def __repr__(self) -> str:
        return f"{[x.shape for x in self.arrays]} {self.arrays[0].dtype} {self.options}"


CALLS = st.builds(
    Call,
    seqlens=st.sampled_from(SEQLENS),
    heads=st.sampled_from([(3, 3), (3, 1), (4, 2)]),
    head_dim=st.sampled_from([8, 20, 32]),
    dtype=st.sampled_from(["float16", "float32"]),
    causal=st.booleans(),
    window_size=st.just((-1, -1)) | st.tuples(st.integers(-1, 140), st.integers(-1, 140)),
    softcap=st.sampled_from([0.0, -1.0, 15.0]),
    alibi=st.sampled_from([0, 1, 2]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.17]),
    softmax_scale=st.sampled_from([None, 0.3]),
)
some_calls = settings(max_examples=40, derandomize=True, database=None, deadline=None)


@some_calls
@given(CALLS)
def test_flash_attn_func_is_accurate(call: Call) -> None:
    manual_seed(SEED)
    out, lse, weights = flash_attn_func(*call.arrays, **call.options, return_attn_probs=True)
    assert lse.shape == (2, call.arrays[0].shape[2], call.arrays[0].shape[1])
    assert (weights is None) == (call.options["dropout_p"] == 0)
    assert_attention_accurate(*call.arrays, out, lse, layout="bshd", **call.ours)
    manual_seed(SEED)
    same_bits(flash_attn_func(*call.arrays, *call.options.values()), out)


@some_calls
@given(CALLS)
def test_varlen_is_each_sequence_alone(call: Call) -> None:
    q, k, v = (np.concatenate([x[0], x[1, : x.shape[1] // 2]]) for x in call.arrays)
    cu_seqlens_q, cu_seqlens_k = (np.cumsum([0, x.shape[1], x.shape[1] // 2], dtype=np.int32) for x in call.arrays[:2])
    longest = int(cu_seqlens_q[1]), int(cu_seqlens_k[1])
    call.options["dropout_p"] = 0.0  # it depends on the number of the sequence: tested for itself
    out, lse, weights = flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest), **call.options, return_attn_probs=True
    )
    assert weights is None
    assert out.dtype == q.dtype and lse.shape == out.shape[1::-1]
    slopes = call.options["alibi_slopes"]
    for b in range(2):
        rows, keys = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])
        if slopes is not None:
            call.ours["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[b]
        alone = {**call.ours, "dropout_p": 0.0}
        assert_attention_accurate(
            q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows], layout="bshd", **alone
        )
    same_bits(flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, *call.options.values()), out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("return_attn_probs", [False, True])
def test_packed_arrays_are_their_parts(causal: bool, dropout_p: float, return_attn_probs: bool) -> None:
    options: dict[str, Any] = {"causal": causal, "dropout_p": dropout_p, "return_attn_probs": return_attn_probs}
    options |= {"window_size": (9, 3), "softcap": 3.0, "softmax_scale": 0.4, "alibi_slopes": normal(2) ** 2}

    def seeded(function: Any, *arrays: Any) -> Any:
        manual_seed(SEED)
        return function(*arrays, **options)

    qkv, q = normal(2, 20, 3, 2, 8), normal(2, 7, 2, 8)
    same_bits(seeded(flash_attn_qkvpacked_func, qkv), seeded(flash_attn_func, qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
    kv = qkv[:, :, 1:]
    same_bits(seeded(flash_attn_kvpacked_func, q, kv), seeded(flash_attn_func, q, kv[:, :, 0], kv[:, :, 1]))

    qkv, q = normal(20, 3, 2, 8), normal(7, 2, 8)
    cu_seqlens_q, cu_seqlens = np.array([[0, 3, 7], [0, 8, 20]], np.int32)
    same_bits(
        seeded(flash_attn_varlen_qkvpacked_func, qkv, cu_seqlens, 12),
        seeded(flash_attn_varlen_func, qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, cu_seqlens, 12, 12),
    )
    kv, lengths = qkv[:, 1:], (cu_seqlens_q, cu_seqlens, 4, 12)
    same_bits(
        seeded(flash_attn_varlen_kvpacked_func, q, kv, *lengths),
        seeded(flash_attn_varlen_func, q, kv[:, 0], kv[:, 1], *lengths),
    )


def test_signed_weights_are_those_of_the_result() -> None:
    q, k, v = normal(2, 30, 4, 8), normal(2, 300, 2, 8, seed=1), normal(2, 300, 2, 5, seed=2)
    manual_seed(SEED)
    out, _, weights = flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    kept = cuflash.dropout_mask(weights.shape, 0.3, seed_of_the_next_call())
    visible = np.tri(30, 300, 270, dtype=bool)
    np.testing.assert_array_equal(weights > 0, kept & visible)
    np.testing.assert_array_equal(weights < 0, ~kept & visible)
    plain, _ = reference_attention(q, k, v, causal=True, layout="bshd")
    values = np.repeat(v, 2, axis=2).swapaxes(1, 2)
    np.testing.assert_allclose((np.abs(weights) @ values).swapaxes(1, 2), plain, atol=1e-5)
    np.testing.assert_allclose((np.where(kept, weights, 0) / 0.7 @ values).swapaxes(1, 2), out, atol=1e-5)


def test_signed_weights_of_float64_are_exact() -> None:
    q, k, v = normal(3, 1, 9, 1, 8, dtype="float64")
    q[:, 0] *= 200  # weights below the smallest number of float32
    manual_seed(SEED)
    _, _, weights = flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
    scores = q[0, :, 0] @ k[0, :, 0].T / math.sqrt(8)
    expected = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    kept = cuflash.dropout_mask(weights.shape, 0.3, seed_of_the_next_call())[0, 0]
    assert 0 < expected.min() < 1e-50 and weights.dtype == np.float64
    np.testing.assert_allclose(weights[0, 0], np.where(kept, expected, -expected), rtol=1e-12)


def test_signed_weights_of_packed_sequences_are_padded() -> None:
    q, k, v = normal(9, 2, 8), normal(20, 1, 8, seed=1), normal(20, 1, 8, seed=2)
    cu_seqlens_q, cu_seqlens_k = np.array([[0, 4, 4, 9], [0, 12, 15, 20]], np.int32)
    manual_seed(SEED)
    out, _, weights = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, 5, 12, 0.3, return_attn_probs=True)
    assert weights.shape == (3, 2, 5, 12)
    kept = cuflash.dropout_mask(weights.shape, 0.3, seed_of_the_next_call())
    for b in range(3):
        rows, keys = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])
        here = weights[b, :, : rows.stop - rows.start, : keys.stop - keys.start]
        np.testing.assert_array_equal(here > 0, kept[b, :, : here.shape[1], : here.shape[2]])
        expected = np.where(here > 0, here, 0) / 0.7 @ v[keys, 0]
        np.testing.assert_allclose(expected.swapaxes(0, 1), out[rows], atol=1e-6)
        weights[b, :, : rows.stop - rows.start, : keys.stop - keys.start] = 0
    assert (weights == 0).all()


def test_dropout_is_random_and_repeatable() -> None:
    q, k, v = normal(3, 1, 20, 2, 8)
    sdpa = [np.swapaxes(x, 1, 2) for x in (q, k, v)]

    def calls() -> list[Any]:
        return [flash_attn_func(q, k, v, 0.5), scaled_dot_product_attention(*sdpa, dropout_p=0.5)]

    manual_seed(SEED)
    first, second = calls(), calls()
    manual_seed(SEED)
    same_bits(tuple(calls()), tuple(first))
    assert not (first[0] == second[0]).all() and not (first[1] == second[1]).all()
    manual_seed(SEED)
    seed = seed_of_the_next_call()
    same_bits(flash_attn_func(q, k, v, 0.5), cuflash.attention(q, k, v, dropout_p=0.5, seed=seed, layout="bshd"))


def test_arrays_of_other_shapes_are_refused() -> None:
    q, cu_seqlens = normal(2, 5, 2, 8), np.array([0, 5, 10], np.int32)
    packed = q.reshape(10, 2, 8)
    for call in (
        lambda: flash_attn_func(q[0], q, q),
        lambda: flash_attn_func(q, q, q[..., None]),
        lambda: flash_attn_qkvpacked_func(normal(2, 5, 2, 2, 8)),
        lambda: flash_attn_qkvpacked_func(q),
        lambda: flash_attn_kvpacked_func(q, normal(2, 5, 3, 2, 8)),
        lambda: flash_attn_varlen_func(q, packed, packed, cu_seqlens, cu_seqlens, 5, 5),
        lambda: flash_attn_varlen_qkvpacked_func(normal(10, 2, 2, 8), cu_seqlens, 5),
        lambda: flash_attn_varlen_kvpacked_func(packed, packed, cu_seqlens, cu_seqlens, 5, 5),
    ):
        with pytest.raises(ValueError, match=r"^(q|k|v|qkv|kv): shape is .*; it must be \("):
            call()
    with pytest.raises(TypeError, match=r"^qkv: got a builtins.list; allowed are"):
        flash_attn_qkvpacked_func([1, 2])
    with pytest.raises(TypeError, match=r"^return_attn_probs: "):
        flash_attn_func(q, q, q, return_attn_probs=1)
    with pytest.raises(NotImplementedError, match=r"^block_table: "):
        flash_attn_varlen_func(packed, q, q, cu_seqlens, cu_seqlens, 5, 5, block_table=cu_seqlens[:, None])


def test_errors_name_the_arguments_of_the_caller() -> None:
    q, wide, offsets = normal(2, 5, 4, 8), normal(2, 5, 3, 4, 300), np.array([0, 5, 10], np.int32)
    for match, call in {
        r"^query: head_dim is 300; ": lambda: scaled_dot_product_attention(*[wide[:, :, 0]] * 3),
        r"^value: head_dim is 300; ": lambda: scaled_dot_product_attention(q, q, wide[:, :, 0]),
        r"^query: has 5 heads; it must be a positive multiple of key's 2": lambda: scaled_dot_product_attention(
            q, q[:, :2], q[:, :2], enable_gqa=True
        ),
        r"^qkv: head_dim is 300; ": lambda: flash_attn_qkvpacked_func(wide),
        r"^kv: head_dim is 4, but q's is 8; ": lambda: flash_attn_kvpacked_func(q, normal(2, 5, 2, 4, 4)),
        r"^kv: head_dim is 4, but q's is 6; ": lambda: flash_attn_varlen_kvpacked_func(
            normal(10, 4, 6), normal(10, 2, 4, 4), offsets, offsets, 5, 5
        ),
        r"^cu_seqlens: got 11 ": lambda: flash_attn_varlen_qkvpacked_func(
            normal(10, 3, 4, 8), offsets + np.int32([0, 0, 1]), 5
        ),
        r"^cu_seqlens: got a builtins.list": lambda: flash_attn_varlen_qkvpacked_func(normal(10, 3, 4, 8), [0, 10], 5),
        r"^max_seqlen: got -1; ": lambda: flash_attn_varlen_qkvpacked_func(
            normal(10, 3, 4, 8), offsets, -1, 0.3, return_attn_probs=True
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            call()


NO_WINDOWS = [(-2, 3), (-1, -2), (3, 1.0), (-1.0, 3), (np.zeros(2), 3), (1, 2, 3), 5]


@pytest.mark.parametrize("window_size", [*NO_WINDOWS, np.zeros(2), np.array(3), np.zeros((2, 2), int)])
def test_what_is_no_window_is_refused(window_size: Any) -> None:
    q = normal(2, 5, 2, 8)
    with pytest.raises(ValueError) as refused:
        flash_attn_func(q, q, q, window_size=window_size)
    assert str(refused.value).startswith(f"window_size: got {window_size!r}; it must be (left, right)")
    assert "-1 for no limit" in str(refused.value)


@pytest.mark.parametrize("window_size", [(3, -1), (-1, 2), (0, 4), (-1, -1)])
def test_a_window_may_be_an_array(window_size: tuple[int, int]) -> None:
    q = normal(2, 9, 2, 8)
    expected = flash_attn_func(q, q, q, window_size=window_size)
    for sides in (list(window_size), np.array(window_size), np.array(window_size, np.int32)):
        same_bits(flash_attn_func(q, q, q, window_size=sides), expected)


@pytest.mark.parametrize("softmax_scale", [math.nan, 1e39, "1", np.array(1.0)])
def test_what_is_no_scale_is_refused(softmax_scale: Any) -> None:
    q = normal(2, 5, 2, 8)
    with pytest.raises((TypeError, ValueError), match=r"^softmax_scale: got"):
        flash_attn_func(q, q, q, softmax_scale=softmax_scale)


@pytest.mark.parametrize("max_seqlen", [-1, 6.0, None, "6", np.array([6])])
def test_lengths_that_shape_a_result_are_sizes(max_seqlen: Any) -> None:
    q, cu_seqlens = normal(10, 2, 8), np.array([0, 4, 10], np.int32)
    for lengths, name in (((max_seqlen, 6), "max_seqlen_q"), ((6, max_seqlen), "max_seqlen_k")):
        with pytest.raises(ValueError, match=rf"^{name}: got .*; it must be an int >= 0"):
            flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, *lengths, 0.3, return_attn_probs=True)


@pytest.mark.parametrize("softcap", [0, np.float32(0), np.float32(-1), np.int64(0)])
def test_a_softcap_of_no_more_than_0_is_none(softcap: Any) -> None:
    q = normal(2, 5, 2, 8)
    same_bits(flash_attn_func(q, q, q, softcap=softcap), flash_attn_func(q, q, q))


@pytest.mark.parametrize("softcap", [math.nan, math.inf, True, "1", np.zeros(2)])
def test_what_is_no_softcap_is_refused(softcap: Any) -> None:
    q = normal(2, 5, 2, 8)
    with pytest.raises((TypeError, ValueError), match=r"^softcap: got"):
        flash_attn_func(q, q, q, softcap=softcap)


@pytest.mark.parametrize("dropout_p", [np.zeros(2), np.array([0.5, 0.5]), None, "0.5", 1.0, -0.5, math.nan])
def test_what_is_no_dropout_p_is_refused(dropout_p: Any) -> None:
    q = normal(2, 5, 2, 8)
    for call in (flash_attn_func, scaled_dot_product_attention):
        with pytest.raises((TypeError, ValueError), match=r"^dropout_p: got"):
            call(q, q, q, dropout_p=dropout_p)


def test_it_is_there_when_it_is_asked_for() -> None:
    code = """
import sys, cuflash
assert "cuflash.flash_attn" not in sys.modules and "flash_attn" in dir(cuflash)
assert not hasattr(cuflash, "flash_atn")
assert cuflash.flash_attn is sys.modules["cuflash.flash_attn"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unpad_and_pad_are_inverse() -> None:
    x = normal(3, 5, 2, 4)
    tokens = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    packed, indices, cu_seqlens, longest, seqused = unpad_input(x, tokens)
    same_bits(packed, x[tokens == 1])
    same_bits(cu_seqlens, np.array([0, 3, 3, 8], np.int32))
    same_bits(seqused, np.array([3, 0, 5], np.int32))
    assert longest == 5 and isinstance(longest, int)
    same_bits(pad_input(packed, indices, 3, 5), np.where(tokens[..., None, None], x, np.float32(0)))

    reserved = np.zeros((3, 5), bool)
    reserved[0, 4] = reserved[1, 0] = True
    packed, _, cu_seqlens, longest, seqused = unpad_input(x, tokens, reserved)
    same_bits(packed, x[(tokens == 1) | reserved])
    same_bits(cu_seqlens, np.array([0, 4, 5, 10], np.int32))
    same_bits(seqused, np.array([3, 0, 5], np.int32))


def test_pad_input_names_its_arguments() -> None:
    with pytest.raises(TypeError, match=r"^hidden_states: got a builtins.list"):
        pad_input([[1.0]], np.array([0]), 1, 1)
    with pytest.raises(ValueError, match=r"^indices: shape is \(2,\); .* the tokens, whose shape is \(3, 4\)"):
        pad_input(normal(3, 4), np.arange(2), 1, 3)


@pytest.mark.parametrize("name", ["attention_mask", "unused_mask"])
@pytest.mark.parametrize(
    ("mask", "error", "pattern"),
    [
        ([[1, 1, 1], [1, 0, 0]], TypeError, r"list.*ndarray"),
        (np.zeros((2, 3)), TypeError, r"float64.*bool and int"),  # 0 where there is a token, as a bias has it
        (np.full((2, 3), "1"), TypeError, r"<U1.*bool and int"),
        (np.ones((1, 3), bool), ValueError, r"\(1, 3\).*hidden_states.*\(2, 3, 4\)"),
        (np.ones((2, 4), bool), ValueError, r"\(2, 4\).*hidden_states.*\(2, 3, 4\)"),
    ],
)
def test_what_is_no_mask_of_tokens_is_refused(name: str, mask: Any, error: type[Exception], pattern: str) -> None:
    masks = {"attention_mask": np.ones((2, 3), bool)} | {name: mask}
    with pytest.raises(error, match=rf"^{name}: .*{pattern}"):
        unpad_input(normal(2, 3, 4), **masks)


def plain_sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """What torch documents, in float64; queries that see no key have 0."""
    if enable_gqa:
        key, value = (np.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    q, k, v = (x.astype(np.float64) for x in (query, key, value))
    scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


@st.composite
def sdpa_calls(draw: st.DrawFn) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """Arrays that broadcast as torch allows, and the options of a call."""
    rank = draw(st.integers(2, 5))
    enable_gqa = rank > 2 and draw(st.booleans())
    heads_kv = draw(st.integers(1, 3))
    heads = heads_kv * draw(st.integers(1, 2)) if enable_gqa else heads_kv
    batch = tuple(draw(st.integers(1, 3)) for _ in range(rank - 3))
    seqlen_q, seqlen_k = draw(st.sampled_from([1, 3, 17])), draw(st.sampled_from([1, 5, 18]))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    random = np.random.default_rng(draw(st.integers(0, 99)))

    def partly(shape: tuple[int, ...], least: int) -> tuple[int, ...]:
        """The shape, some of its axes 1, some in front left out."""
        ones = tuple(1 if draw(st.booleans()) and draw(st.booleans()) else size for size in shape)
        return ones[draw(st.integers(0, len(ones) - least)) if draw(st.booleans()) else 0 :]

    def array(heads: int, rows: int, columns: int) -> Any:
        lead = partly(batch, 0) if rank > 3 else batch
        axis = () if rank == 2 else (heads,) if enable_gqa else (draw(st.sampled_from([heads, heads, 1])),)
        x = random.standard_normal((*lead, *axis, columns, rows)).astype(dtype).swapaxes(-1, -2)
        return x if draw(st.booleans()) else np.ascontiguousarray(x)

    head_dim = draw(st.sampled_from([4, 8]))
    arrays = array(heads, seqlen_q, head_dim), array(heads_kv, seqlen_k, head_dim), array(heads_kv, seqlen_k, 6)
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.25, -1.0])), "enable_gqa": enable_gqa}
    if draw(st.booleans()):
        options["is_causal"] = draw(st.booleans())
        return arrays, options
    expanded = (np.repeat(x, heads // x.shape[-3], -3) if enable_gqa else x for x in arrays)
    q, k, _ = expanded
    shape = (*np.broadcast_shapes(*(x.shape[:-2] for x in (q, k))), seqlen_q, seqlen_k)
    shape = partly(shape, 2)
    kind = draw(st.sampled_from(["bool", dtype, "float32"]))
    options["attn_mask"] = random.random(shape) < 0.7 if kind == "bool" else random.standard_normal(shape).astype(kind)
    return arrays, options


@settings(some_calls, max_examples=200)
@given(sdpa_calls())
def test_sdpa_is_what_torch_documents(call: Any) -> None:
    arrays, options = call
    copies = [x.copy() for x in arrays]
    out = scaled_dot_product_attention(*arrays, **options)
    expected = plain_sdpa(*arrays, **options)
    assert out.dtype == arrays[0].dtype and out.shape == expected.shape
    np.testing.assert_allclose(out, expected, atol=1e-5 if out.dtype == np.float32 else 1e-12)
    same_bits(tuple(arrays), tuple(copies))


@settings(some_calls, max_examples=200)
@given(sdpa_calls())
def test_sdpa_is_torch(call: Any) -> None:
    torch = pytest.importorskip("torch")
    arrays, options = call
    theirs = {name: torch.from_numpy(x) if name == "attn_mask" else x for name, x in options.items()}
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, arrays), **theirs).numpy()
    out = scaled_dot_product_attention(*arrays, **options)
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, atol=1e-5 if out.dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("mask", [np.arange(5) % 2 == 0, normal(5), np.array(True), np.array(np.float32(0.5))])
def test_sdpa_takes_masks_of_less_than_two_axes(rank: int, mask: Any) -> None:
    q, k, v = normal(3, 2, 3, 2, 5, 8)[(slice(None), *(0,) * (5 - rank))]
    whole = scaled_dot_product_attention(q, k, v, np.broadcast_to(mask, (5, 5)))
    same_bits(scaled_dot_product_attention(q, k, v, mask), whole)


def test_sdpa_of_one_batch_of_many_axes_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash.flash_attn import _sdpa

    taken: list[Any] = []

    def attention(*arrays: Any, **options: Any) -> Any:
        taken.extend([*arrays, options.get("bias")])
        return cuflash.attention(*arrays, **options)

    monkeypatch.setattr(_sdpa, "attention", attention)
    query, key, mask = normal(2, 3, 5, 4, 8).swapaxes(2, 3), normal(1, 1, 4, 6, 8), normal(2, 3, 1, 5, 6)
    assert scaled_dot_product_attention(query, key, key, mask).shape == (2, 3, 4, 5, 8)
    for array, original in zip(taken, (query, key, key, mask), strict=True):
        assert np.shares_memory(array, original)
    assert taken[1].shape[0] == 1


def test_sdpa_refuses_what_torch_refuses() -> None:
    q, k = normal(2, 4, 3, 8), normal(2, 2, 5, 8)
    for match, call in {
        r"^attn_mask: got an array together with is_causal": {"attn_mask": np.ones((3, 5), bool), "is_causal": True},
        r"^attn_mask: shape is \(4, 5\); it must broadcast to \(2, 4, 3, 5\)": {"attn_mask": np.ones((4, 5), bool)},
        r"^attn_mask: shape is \(3,\); it must": {"attn_mask": np.ones(3, bool)},
        r"^attn_mask: shape is \(1, 1, 1, 3, 5\); it must": {"attn_mask": np.ones((1, 1, 1, 3, 5), bool)},
    }.items():
        with pytest.raises(ValueError, match=match):
            scaled_dot_product_attention(q, k, k, **call, enable_gqa=True)
    with pytest.raises(TypeError, match=r"^attn_mask: dtype is int64; allowed are bool, float32 and query's float32"):
        scaled_dot_product_attention(q, k, k, np.ones((3, 5), np.int64), enable_gqa=True)
    with pytest.raises(ValueError, match=r"^heads without enable_gqa=True do not broadcast \(query: \(4,\)"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match=r"^axes before the heads do not broadcast"):
        scaled_dot_product_attention(normal(3, 2, 3, 8), k, k)
    with pytest.raises(ValueError, match=r"^key: its head dimension is 4, but query's is 8"):
        scaled_dot_product_attention(q, k[..., :4], k, enable_gqa=True)
    with pytest.raises(ValueError, match=r"^value: its sequence length is 2, but key's is 5"):
        scaled_dot_product_attention(q, k, k[..., :2, :], enable_gqa=True)
    with pytest.raises(ValueError, match=r"^query: shape is \(8,\); it must have 2 or more axes"):
        scaled_dot_product_attention(normal(8), k, k)
    with pytest.raises(TypeError, match=r"^query: dtype int64 is not supported"):
        scaled_dot_product_attention(*(x.astype(np.int64) for x in (q, k, k)), enable_gqa=True)
    with pytest.raises(TypeError, match=r"^value: dtype float64 differs from query's float32"):
        scaled_dot_product_attention(q, k, k.astype(np.float64), enable_gqa=True)
    with pytest.raises(TypeError, match=r"^key: got a builtins.list"):
        scaled_dot_product_attention(q, [1], k)
    with pytest.raises(TypeError, match="positional"):
        scaled_dot_product_attention(q, k, k, None, 0.0, False, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cupy_arrays_give_what_numpy_arrays_give(gpu: Any, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    q, k, v = normal(3, 2, 300, 4, 8, dtype=dtype)
    bhsd = q[None, :, :5].swapaxes(2, 3), k[:1].swapaxes(1, 2), v[:1].swapaxes(1, 2)
    packed, cu_seqlens = q.reshape(600, 4, 8), np.array([0, 270, 270, 600], np.int32)
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.2, "return_attn_probs": True, "softcap": 4.0}
    options["alibi_slopes"] = normal(4) ** 2
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (flash_attn_func, (q, k, v), options),
        (flash_attn_varlen_func, (packed, packed, packed, cu_seqlens, cu_seqlens, 330, 330), options),
        (scaled_dot_product_attention, bhsd, {"attn_mask": normal(2, 1, 5, 300), "dropout_p": 0.2}),
        (scaled_dot_product_attention, bhsd, {"attn_mask": normal(1, 5, 300) > 0, "scale": 0.5}),
        (scaled_dot_product_attention, (q[0], k[0], v[0]), {"is_causal": True}),
        (unpad_input, (q, normal(2, 300) > 0, normal(2, 300, seed=1) > 1), {}),
        (pad_input, (q[0], np.arange(300) * 2, 6, 100), {}),
    ]

    def on_gpu(x: Any) -> Any:
        return gpu.asarray(x) if isinstance(x, np.ndarray) else x

    for function, arguments, named in calls:
        manual_seed(SEED)
        expected = function(*arguments, **named)
        manual_seed(SEED)
        actual = function(*map(on_gpu, arguments), **{name: on_gpu(x) for name, x in named.items()})
        both = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
        for x, y in both:
            if not isinstance(y, np.ndarray):
                assert x == y
                continue
            assert isinstance(x, gpu.ndarray)
            assert x.dtype == y.dtype and x.shape == y.shape
            tolerance = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
            np.testing.assert_allclose(gpu.asnumpy(x).astype(float), y.astype(float), rtol=tolerance, atol=tolerance)
