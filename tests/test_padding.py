"""From padded to packed sequences and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import cuflash

masks = npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9))
many = settings(max_examples=100, derandomize=True, deadline=None)


@many
@given(masks, st.sampled_from([(), (3,), (2, 3)]))
def test_what_is_unpadded_is_padded_again(mask: Any, rest: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((*mask.shape, *rest), np.float32)
    x_unpad, indices, cu_seqlens, max_seqlen = cuflash.unpad_input(x, mask)
    np.testing.assert_array_equal(x_unpad, x[mask])
    assert cu_seqlens.dtype == np.int32 and cu_seqlens[0] == 0
    np.testing.assert_array_equal(np.diff(cu_seqlens), mask.sum(axis=1))
    assert max_seqlen == max(mask.sum(axis=1), default=0) and type(max_seqlen) is int
    padded = cuflash.pad_input(x_unpad, indices, *mask.shape)
    assert padded.dtype == x.dtype
    np.testing.assert_array_equal(padded, np.where(mask.reshape(*mask.shape, *(1,) * len(rest)), x, 0))


@many
@given(masks)
def test_each_is_the_gradient_of_the_other(mask: Any) -> None:
    x, dx = np.random.default_rng(1).integers(-9, 10, (2, *mask.shape, 2))
    x_unpad, indices, *_ = cuflash.unpad_input(x, mask)
    dx_unpad = dx.reshape(-1, 2)[indices]
    assert (x_unpad * dx_unpad).sum() == (x * cuflash.pad_input(dx_unpad, indices, *mask.shape)).sum()


def test_a_packed_call_is_the_masked_call() -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 3, 20, 2, 8), np.float32)
    mask = np.arange(20) < np.array([[7], [20], [0]])
    packed = [cuflash.unpad_input(x, mask) for x in (q, k, v)]
    _, indices, cu_seqlens, _ = packed[0]
    out = cuflash.attention_varlen(*(x for x, *_ in packed), cu_seqlens, cu_seqlens, causal="top-left")
    expected = cuflash.attention(q, k, v, mask=mask[:, None, None], causal="top-left", layout="bshd")
    np.testing.assert_allclose(cuflash.pad_input(out, indices, 3, 20)[mask], expected[mask], atol=1e-6)


def test_sizes_may_be_small_integers() -> None:
    padded = cuflash.pad_input(np.ones(1), np.array([399]), np.int8(20), np.int8(20))
    assert padded.shape == (20, 20) and padded[-1, -1] == 1


def test_masks_of_integers_and_any_strides() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    mask = np.array([[1, 0, 1], [0, 2, 0]])
    np.testing.assert_array_equal(cuflash.unpad_input(x, mask)[0], x[mask != 0])
    x, mask = x[::-1, :, ::2], mask[:, ::-1]
    np.testing.assert_array_equal(cuflash.unpad_input(x, mask)[0], x[mask != 0])


pad_input: Any = cuflash.pad_input
X, MASK = np.ones((2, 3, 4), np.float32), np.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: cuflash.unpad_input(X, MASK.tolist()), TypeError, "attention_mask: got a builtins.list"),
        (lambda: cuflash.unpad_input(X, MASK.astype(float)), TypeError, "attention_mask: dtype float64"),
        (lambda: cuflash.unpad_input(X, MASK[:, :2]), ValueError, r"attention_mask: shape is \(2, 2\).*\(2, 3, 4\)"),
        (lambda: cuflash.unpad_input(X, MASK[0]), ValueError, r"attention_mask: shape is \(3,\)"),
        (lambda: pad_input(X[0], np.array([0.0, 1, 2]), 2, 3), TypeError, "indices: dtype float64"),
        (lambda: pad_input(X[0], np.array([0, 1]), 2, 3), ValueError, r"indices: shape is \(2,\).*\(3, 4\)"),
        (lambda: pad_input(X[0], np.array([0, 1, 2]), 2, -3), ValueError, "seqlen: got -3"),
        (lambda: pad_input(X[0], np.array([0, 1, 2]), 2.0, 3), ValueError, "batch: got 2.0"),
        (lambda: pad_input(X[0], np.array([0, 1, 2]), True, 3), ValueError, "batch: got True"),
        (lambda: pad_input(X[0], np.array([0, 1, 6]), 2, 3), ValueError, "got 6 at index 2, where 0 to 5 are allowed"),
        (lambda: pad_input(X[0], np.array([0, 1, -1]), 2, 3), ValueError, "indices: got -1 at index 2"),
        (lambda: pad_input(X[0], np.array([0, 4, 4]), 2, 3), ValueError, "indices: has 4 more than once"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: Any, pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        call()
