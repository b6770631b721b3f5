"""Dropout: which weights survive, drawn from a counter, the same in every kernel and backend."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _check_options, _checks

Array = NDArray[Any]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
ROUNDS = 7  # the fewest with which Philox4x32 passes all tests of its paper (Salmon et al., section 4)


def philox(
    key: tuple[int, int], counter: tuple[Any, Any, Any, Any], rounds: int = ROUNDS
) -> tuple[Array, Array, Array, Array]:
    """Philox4x32: four words of random bits for each key and counter (Salmon et al., SC 2011).

    Words are held in uint64; counters broadcast.
    """
    key_0, key_1 = key
    words: list[Array] = [np.asarray(word, np.uint64) for word in counter]
    counter_0, counter_1, counter_2, counter_3 = words
    for _ in range(rounds):
        product_0, product_1 = counter_0 * MULTIPLIERS[0], counter_2 * MULTIPLIERS[1]
        counter_0 = product_1 >> 32 ^ counter_1 ^ key_0
        counter_1 = product_1 & WORD
        counter_2 = product_0 >> 32 ^ counter_3 ^ key_1
        counter_3 = product_0 & WORD
        key_0, key_1 = (key_0 + KEY_STEPS[0]) & WORD, (key_1 + KEY_STEPS[1]) & WORD
    return counter_0, counter_1, counter_2, counter_3


@cache
def _ordered() -> Array:
    """All patterns of 16 bits, as float16 in ascending order, NaN last."""
    return np.sort(np.arange(65536, dtype=np.uint16).view(np.float16))


def threshold(dropout_p: float) -> tuple[np.float16, bool]:
    """What random numbers are compared with, and whether the weights of those below are dropped, or alone survive.

    The rarer of the two, so that NaN is not below.
    """
    drops_below = dropout_p <= 0.5
    return _ordered()[round(65536 * (dropout_p if drops_below else 1 - dropout_p))], drops_below


def kept_pairs(dropout_p: float, seed: int, batch: int, heads: slice, queries: slice, keys: slice) -> Array:
    """True where a pair survives, of shape (heads, queries, keys)."""
    row = np.arange(queries.start // 16 * 8, -(-queries.stop // 16) * 8)
    column = np.arange(keys.start // 32 * 4, -(-keys.stop // 32) * 4)
    head = np.arange(heads.start, heads.stop)
    words = np.stack(philox((seed & WORD, seed >> 32), (column, row[:, None], head[:, None, None], batch)))
    rotated = (words << 8 | words >> 24) & WORD
    numbers = np.stack((words, rotated)).astype("<u4").view("<f2")  # the low half of a word comes first
    limit, drops_below = threshold(dropout_p)
    kept = (numbers < limit) != drops_below
    # Of its 16 x 32, a pair is query 8 a + r and key 16 d + 8 c + 2 t + e: half e of word 2 d + a, drawn at row r and
    # column t, and rotated if c is 1.
    kept = kept.reshape(2, 2, 2, len(head), len(row) // 8, 8, len(column) // 4, 4, 2)  # c, d, a, head, _, r, _, t, e
    kept = kept.transpose(3, 4, 2, 5, 6, 1, 0, 7, 8).reshape(len(head), 2 * len(row), 8 * len(column))
    i, j = queries.start % 16, keys.start % 32
    return kept[:, i : i + queries.stop - queries.start, j : j + keys.stop - keys.start]


def dropout_mask(shape: tuple[int, int, int, int], dropout_p: float, seed: Any) -> Array:
    """Which weights a call of :func:`attention` keeps.

    The pairs of query ``i`` and key ``j`` of a head are cut into tiles of 16 x 32. Philox4x32-7 [1]_ with the key
    ``(seed mod 2**32, seed // 2**32)`` and the counter ``(j // 32 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, h, b)`` gives
    four words. Word ``j // 16 % 2 * 2 + i // 8 % 2``, rotated left by 8 bits if ``j // 8`` is odd, has the number of
    the pair, read as float16: in its low half for an even ``j``, in its high half for an odd one. If ``dropout_p`` is
    at most 1/2, the weight is dropped iff its number is below ``t``, the float16 that has ``round(65536 * dropout_p)``
    of all 65536 patterns below it (the first of them if two are equal, +0 and -0). Otherwise it is kept iff its number
    is below the ``t`` of ``1 - dropout_p``. NaN is never below.

    Weights that share a word have a correlation of 1/256 or less: the first byte of each number is no other's first
    byte, and decides but for one of its 256 values, for which the first byte of another number decides.

    Parameters
    ----------
    shape : (int, int, int, int)
        ``(B, Hq, M, N)``. ``b`` of packed sequences is the number of the sequence, and ``i``, ``j`` count within it.
    dropout_p : float
        Probability of dropping a weight, in [0, 1).
    seed : int or array
        As for :func:`attention`.

    Returns
    -------
    numpy.ndarray of bool, shape (B, Hq, M, N)
        True where a weight is kept, and then divided by ``1 - dropout_p``.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a type, or has a value, that is not allowed.

    References
    ----------
    .. [1] J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import cuflash
    >>> kept = cuflash.dropout_mask((1, 1, 100, 100), 0.25, seed=7)
    >>> kept.shape, round(float(kept.mean()), 2)
    ((1, 1, 100, 100), 0.76)
    """
    batch, heads, seqlen_q, seqlen_k = shape = _checks.shape(shape, 4)
    dropout_p = _check_options.dropout_p(dropout_p, has_seed=seed is not None)
    if seed is not None and not _check_options.is_seed_number(seed):
        _check_options.seed_array(seed)
        seed = seed.item()
    if dropout_p == 0:
        return np.ones(shape, bool)
    kept = np.empty(shape, bool)
    for b in range(batch):
        for h in range(heads):
            head = slice(h, h + 1)
            kept[b, head] = kept_pairs(dropout_p, int(seed), b, head, slice(0, seqlen_q), slice(0, seqlen_k))
    return kept
