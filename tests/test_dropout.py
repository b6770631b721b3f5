"""Dropout's random bits: Philox as published, laid out as documented, and as random as they should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash._dropout import kept_pairs, philox, threshold

ONES = 0xFFFFFFFF
PATTERNS = np.arange(2**16, dtype=np.uint16).view(np.float16)
ORDERED = np.array(sorted(PATTERNS[~np.isnan(PATTERNS)]))


@pytest.mark.parametrize(
    ("rounds", "key", "counter", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 7 and 10 rounds; the last are digits of pi
        (7, (0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            10,
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_the_published_one(rounds: int, key: Any, counter: Any, expected: Any) -> None:
    assert tuple(int(word) for word in philox(key, counter, rounds)) == expected


def is_kept(b: int, h: int, i: int, j: int, dropout_p: float, seed: int) -> bool:
    """The documentation of dropout_mask, pair by pair."""
    counter = (j // 32 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, h, b)
    word = int(philox((seed % 2**32, seed // 2**32), counter)[j // 16 % 2 * 2 + i // 8 % 2])
    if j // 8 % 2:
        word = word % 2**24 * 2**8 + word // 2**24
    number = np.array(word // 2**16 if j % 2 else word % 2**16, np.uint16).view(np.float16)
    if dropout_p <= 0.5:
        return not number < ORDERED[round(65536 * dropout_p)]
    return bool(number < ORDERED[round(65536 * (1 - dropout_p))])


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(0, 2**64 - 1), st.floats(0.01, 0.99))
def test_each_pair_has_the_bits_that_are_documented(seed: int, dropout_p: float) -> None:
    mask = cuflash.dropout_mask((2, 2, 19, 35), dropout_p, seed)
    for b, h, i, j in np.ndindex(2, 2, 19, 35):
        if (i + j) % 3 == 0:
            assert mask[b, h, i, j] == is_kept(b, h, i, j, dropout_p, seed)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_a_block_is_cut_out_of_the_whole(data: st.DataObject) -> None:
    whole = cuflash.dropout_mask((3, 4, 50, 70), 0.3, seed=2**40 + 7)
    b = data.draw(st.integers(0, 2))
    pieces = []
    for size in (4, 50, 70):
        start = data.draw(st.integers(0, size))
        pieces.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(kept_pairs(0.3, 2**40 + 7, b, *pieces), whole[(b, *pieces)])


@pytest.mark.parametrize("dropout_p", [1e-6, 0.001, 0.17, 0.48437, 0.4844, 0.5, 0.5001, 0.9, 0.999999])
def test_the_share_of_numbers_that_drop_a_weight(dropout_p: float) -> None:
    limit, drops_below = threshold(dropout_p)
    below = int(np.less(PATTERNS, limit).sum())
    dropped = below if drops_below else 2**16 - below
    assert abs(dropped - 2**16 * dropout_p) <= (1.5 if limit == 0 else 0.5)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.83])
def test_the_share_of_kept_weights(dropout_p: float) -> None:
    shape = (2, 3, 256, 512)
    kept = cuflash.dropout_mask(shape, dropout_p, seed=11).astype(float)
    deviation = np.sqrt(dropout_p * (1 - dropout_p))
    for axes in ((0, 1, 2, 3), (2, 3), (3,), (2,), (0, 1)):
        count = np.prod([shape[axis] for axis in axes])
        z = (kept.mean(axis=axes) - (1 - dropout_p)) / (deviation / np.sqrt(count))
        assert np.abs(z).max() < 6  # beyond 6 deviations it is no accident
        if z.size > 500 and count > 100:  # the means scatter as much as those of independent weights
            assert abs(z.var() - 1) < 6 * np.sqrt(2 / z.size)


@pytest.mark.parametrize("shift", [1, 2, 7, 8, 9, 16, 32, 128])
@pytest.mark.parametrize("axis", [2, 3])
def test_neighbours_are_independent(shift: int, axis: int) -> None:
    centred = cuflash.dropout_mask((1, 2, 512, 512), 0.5, seed=5) - 0.5
    products = np.roll(centred, shift, axis) * centred * 4
    assert abs(products.mean()) < 6 / np.sqrt(products.size)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.83])
def test_weights_that_share_a_word_are_all_but_independent(dropout_p: float) -> None:
    kept = cuflash.dropout_mask((1, 4, 1024, 1024), dropout_p, seed=5)[0]
    centred = (kept - (1 - dropout_p)) / np.sqrt(dropout_p * (1 - dropout_p))
    of_word = centred.reshape(4, 1024, 64, 2, 4, 2).transpose(3, 5, 0, 1, 2, 4).reshape(4, -1)  # keys j, +1, +8, +9
    correlation = of_word @ of_word.T / of_word.shape[1] - np.eye(4)
    assert np.abs(correlation).max() < 1 / 256 + 6 / np.sqrt(of_word.shape[1])


@pytest.mark.parametrize("other", [4, 5 + 2**32, 5 + 2**63])
def test_seeds_heads_and_batches_are_independent(other: int) -> None:
    first = cuflash.dropout_mask((2, 2, 128, 128), 0.5, seed=5) - 0.5
    second = cuflash.dropout_mask((2, 2, 128, 128), 0.5, seed=other) - 0.5
    for a, b in ((first, second), (first[0], first[1]), (first[:, 0], first[:, 1])):
        assert abs((a * b * 4).mean()) < 6 / np.sqrt(a.size)


def test_near_1_the_share_has_steps_and_the_divisor_has_none() -> None:
    q, v = np.zeros((1024, 1)), np.ones((1024, 1))
    kept = cuflash.dropout_mask((1, 1, 1024, 1024), 0.99999, 0)[0, 0]
    assert abs(kept.mean() - 2**-16) < 4 * 2**-18  # deviations of 16 in 2**20
    out = cuflash.attention(q, q, v, dropout_p=0.99999, seed=0)
    np.testing.assert_allclose(out[:, 0], kept.mean(axis=1) / (1 - 0.99999))
    assert not cuflash.attention(q, q, v, dropout_p=1 - 1 / 131072, seed=0).any()


def test_the_seed_may_be_an_array_and_no_dropout_keeps_all() -> None:
    mask = cuflash.dropout_mask((1, 1, 20, 20), 0.5, np.array([2**63 + 1], np.uint64))
    np.testing.assert_array_equal(mask, cuflash.dropout_mask((1, 1, 20, 20), 0.5, 2**63 + 1))
    assert cuflash.dropout_mask((1, 2, 3, 0), 0.5, 1).shape == (1, 2, 3, 0)
    assert cuflash.dropout_mask((1, 2, 3, 4), 0.0, None).all()


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        (((1, 2, 3), 0.5, 1), ValueError, r"shape: got \(1, 2, 3\)"),
        (((1, 2, 3, -1), 0.5, 1), ValueError, r"shape: got \(1, 2, 3, -1\)"),
        ((5, 0.5, 1), ValueError, "shape: got 5; it must be 4 sizes >= 0"),
        (((1, 1, 2.5, 3), 0.5, 1), ValueError, r"shape: got \(1, 1, 2.5, 3\)"),
        (((1, 2, 3, 4), 1.0, 1), ValueError, r"dropout_p: got 1.0; allowed are numbers in \[0, 1\)"),
        (((1, 2, 3, 4), 0.5, None), ValueError, "seed: got None"),
        (((1, 2, 3, 4), 0.5, 2**64), ValueError, "seed: got 18446744073709551616"),
        (((1, 2, 3, 4), 0.5, np.array([1])), TypeError, "seed: dtype is int64"),
        (((1, 2, 3, 4), 0.0, -3), ValueError, "seed: got -3"),
        (((1, 2, 3, 4), 0.0, "x"), TypeError, "seed: got 'x'"),
        (((1, 2, 3, 4), np.longdouble(1) - np.longdouble(2) ** -60, 1), ValueError, "dropout_p: got .*allowed are"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, error: Any, pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        cuflash.dropout_mask(*arguments)
