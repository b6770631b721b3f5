"""Block masks: the blocks are those of the mask, and calls with one give what they give without it."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash.testing import reference_attention
from cuflash.testing.mods import MASK_MODS

many = settings(max_examples=60, derandomize=True, deadline=None)


def blocks_of(mask: Any) -> tuple[Any, Any]:
    """Return which blocks of a mask of 4 axes have a pair that is seen, and which none that is hidden."""
    *_, seqlen_q, seqlen_k = mask.shape
    rows, columns = range(0, seqlen_q, 128), range(0, seqlen_k, 128)
    pieces = [[mask[..., i : i + 128, j : j + 128] for j in columns] for i in rows]
    shape = (*mask.shape[:2], len(rows), len(columns))
    return tuple(
        np.array([[of(piece, axis=(-1, -2)) for piece in row] for row in pieces], bool)
        .reshape(*shape[2:], *shape[:2])
        .transpose(2, 3, 0, 1)
        for of in (np.any, np.all)
    )


@st.composite
def masks(draw: st.DrawFn) -> Any:
    """Draw masks with blocks of all kinds, of lengths around multiples of the block."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seqlen_q, seqlen_k = (draw(st.sampled_from([0, 1, 100, 127, 128, 129, 300])) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = rng.choice([0.0, 1.0, 0.5, 1e-4, 1 - 1e-4], (batch, heads, 3, 3)).repeat(128, 2).repeat(128, 3)
    return rng.random((batch, heads, seqlen_q, seqlen_k)) < share[:, :, :seqlen_q, :seqlen_k]


@many
@given(masks())
def test_the_blocks_of_a_mask(mask: Any) -> None:
    visible, full = blocks_of(mask)
    for block_mask in (
        cuflash.make_block_mask(mask),
        cuflash.make_block_mask(mask_mod=lambda score, b, h, i, j: mask[b, h, i, j], shape=mask.shape),
    ):
        np.testing.assert_array_equal(block_mask.visible, visible)
        np.testing.assert_array_equal(block_mask.full, full)
        assert block_mask.shape == mask.shape[2:]


@many
@given(masks(), st.sampled_from(sorted(MASK_MODS)))
def test_a_mask_and_a_mask_mod_hide_together(mask: Any, name: str) -> None:
    mod = MASK_MODS[name].callable(MASK_MODS[name].make_args(np.random.default_rng(0), mask.shape))
    b, h, i, j = np.ogrid[tuple(slice(size) for size in mask.shape)]
    both = mask & mod(None, b, h, i[0, 0], j[0, 0, 0])
    block_mask = cuflash.make_block_mask(mask, mod, shape=mask.shape)
    visible, full = blocks_of(both)
    np.testing.assert_array_equal(block_mask.visible, visible)
    np.testing.assert_array_equal(block_mask.full, full)


@many
@given(masks().filter(lambda mask: mask.size > 0), st.booleans())
def test_a_call_is_the_same_with_the_block_mask_of_its_mask(mask: Any, causal: bool) -> None:
    batch, heads, seqlen_q, seqlen_k = mask.shape
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, batch, heads, seqlen_q, 4))
    k, v = rng.standard_normal((2, batch, 1, seqlen_k, 4))
    results = []
    for block_mask in (None, cuflash.make_block_mask(mask)):
        (out, lse), vjp = cuflash.attention_vjp(
            q, k, v, mask=mask, causal=causal, block_mask=block_mask, return_lse=True
        )
        results.append((out, lse, *vjp(dout)))
    for x, y in zip(*results, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_axes_that_do_not_matter_have_size_1() -> None:
    shape = (2, 3, 300, 200)
    document = np.arange(300) // 50
    for mask_mod, expected in (
        (lambda score, b, h, i, j: document[i] == document[j], (1, 1, 3, 2)),
        (lambda score, b, h, i, j: i + h > j, (1, 3, 3, 2)),
        (lambda score, b, h, i, j: i + b > j, (2, 1, 3, 2)),
        (lambda score, b, h, i, j: np.True_, (1, 1, 3, 2)),
    ):
        assert cuflash.make_block_mask(mask_mod=mask_mod, shape=shape).visible.shape == expected
    mask = np.ones((3, 1, 200), bool)
    assert cuflash.make_block_mask(mask, shape=shape).visible.shape == (1, 3, 3, 2)


@many
@given(st.integers(1, 70), st.sampled_from("CF"), st.integers(0, 2**32))
def test_words_hold_a_bit_per_block(blocks: int, order: Any, seed: int) -> None:
    visible = np.asarray(np.random.default_rng(seed).random((2, 1, 3, blocks)) < 0.5, order=order)
    block_mask = cuflash.BlockMask(visible, visible, (300, 128 * blocks - 5))
    for words in block_mask.words:
        assert words.dtype == np.uint32 and words.shape == (2, 1, 3, -(-blocks // 32)) and words.flags.c_contiguous
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
        np.testing.assert_array_equal(bits[..., :blocks], visible)
        assert not bits[..., blocks:].any()
    assert block_mask.words is block_mask.words


def test_blocks_given_by_the_caller() -> None:
    visible = np.array([[True, False, True]])
    block_mask = cuflash.BlockMask.from_blocks(visible, np.array([[True, True, False]]), shape=(100, 300))
    visible[:] = False
    assert block_mask.visible.tolist() == [[[[True, False, True]]]]
    assert block_mask.full.tolist() == [[[[True, False, False]]]]  # what is hidden is not full


def test_blocks_cannot_be_changed_afterwards() -> None:
    visible = np.ones((1, 1, 1, 3), bool)
    block_mask = cuflash.BlockMask(visible, visible, (100, 300))
    for same in (block_mask, copy.deepcopy(block_mask), pickle.loads(pickle.dumps(block_mask))):
        assert (same.shape, same.needs) == ((100, 300), ())
        for array, its_own in zip((same.visible, same.full, *same.words), (visible, visible, 7, 7), strict=True):
            np.testing.assert_array_equal(array, np.broadcast_to(its_own, array.shape))
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    visible[:] = False  # the caller's own


@pytest.mark.parametrize("as_mod", [False, True])
def test_full_blocks_are_seen_whatever_the_mask_says(as_mod: bool) -> None:
    visible, full = np.array([[True, True, False, True]]), np.array([[True, False, False, False]])
    block_mask = cuflash.BlockMask.from_blocks(visible, full, shape=(100, 400))
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((100, 8)), *rng.standard_normal((2, 400, 8))
    mask = rng.random((100, 400)) < 0.5
    expected = mask.copy()
    expected[:, :128], expected[:, 256:384] = True, False
    hiding: Any = {"mask_mod": lambda score, b, h, i, j: mask[i, j]} if as_mod else {"mask": mask}
    out = cuflash.attention(q, k, v, block_mask=block_mask, **hiding)
    np.testing.assert_allclose(out, cuflash.attention(q, k, v, mask=expected))
    np.testing.assert_allclose(out, reference_attention(q, k, v, block_mask=block_mask, **hiding)[0])


def test_no_array_of_all_pairs_is_made() -> None:
    seqlen = 4096
    tracemalloc.start()
    cuflash.make_block_mask(mask_mod=lambda score, b, h, i, j: i >= j, shape=(4, 8, seqlen, seqlen))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < seqlen * seqlen / 4


MASK: Any = np.ones((2, 3), bool)
make_block_mask: Any = cuflash.make_block_mask
from_blocks: Any = cuflash.BlockMask.from_blocks


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: make_block_mask(), ValueError, "mask, mask_mod: both are None"),
        (lambda: make_block_mask(len), TypeError, r"mask: got <built-in function len>; .* is it mask_mod=\?"),
        (lambda: make_block_mask(mask_mod=lambda *_: True), ValueError, "shape: got None"),
        (lambda: make_block_mask(MASK, shape=(2, 3)), ValueError, r"shape: got \(2, 3\)"),
        (lambda: make_block_mask(MASK, shape=5), ValueError, "shape: got 5; it must be 4 sizes"),
        (lambda: make_block_mask(MASK, shape=(1, 1, 2.5, 3)), ValueError, r"shape: got \(1, 1, 2.5, 3\)"),
        (lambda: make_block_mask(MASK, shape=(True, 1, 2, 3)), ValueError, "shape: got"),
        (lambda: make_block_mask(MASK[None, None, None]), ValueError, "mask: shape"),
        (
            lambda: make_block_mask(MASK, shape=(1, 1, 2, 4)),
            ValueError,
            r"mask: shape \(2, 3\).*\(1, 1, 2, 4\)",
        ),
        (lambda: make_block_mask(MASK.astype(int)), TypeError, "mask: dtype int64"),
        (lambda: make_block_mask(MASK, "q_idx > 0"), TypeError, "mask_mod: got 'q_idx > 0'.*callable"),
        (lambda: make_block_mask(MASK, lambda *_: np.ones(4)), ValueError, r"mask_mod: returned shape \(4,\)"),
        (lambda: make_block_mask(MASK, lambda *_: np.ones((3, 1, 1, 1))), ValueError, "mask_mod: returned"),
        (lambda: make_block_mask(MASK, 7), TypeError, "mask_mod: got"),
        (lambda: make_block_mask([[True]]), TypeError, "mask: got a builtins.list"),
        (
            lambda: cuflash.BlockMask.from_blocks(MASK, shape=(256, 256)),
            ValueError,
            r"visible: shape is \(2, 3\).*\(2, 2\)",
        ),
        (lambda: from_blocks(MASK, shape=(2, 2, 3)), ValueError, r"shape: got \(2, 2, 3\).*2 sizes.*queries, keys"),
        (lambda: from_blocks(MASK, shape=256), ValueError, "shape: got 256"),
        (lambda: cuflash.BlockMask.from_blocks(MASK.astype(int), shape=(256, 300)), TypeError, "visible: dtype int64"),
        (lambda: cuflash.BlockMask.from_blocks(MASK, MASK[None], shape=(256, 300)), ValueError, "full: shape is"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: Any, pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        call()
