"""Programmable scores and masks to test with, each as a CUDA expression and as a Python callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, int, int, int]
Args = dict[str, Any]


@dataclass(frozen=True)
class SampleMod:
    """A value of `score_mod` or `mask_mod` in both languages.

    Parameters
    ----------
    expression : str
        The CUDA C++ expression.
    function : callable
        The same in Python, ``function(score, b, h, q_idx, kv_idx, **args)``.
    make_args : callable
        ``make_args(rng, (B, Hq, M, N))`` makes the `mod_args`: NumPy arrays and scalars by name.

    Examples
    --------
    >>> import numpy as np
    >>> mod = SCORE_MODS["relative"]
    >>> mod.expression
    'score + 0.0625f * (q_idx - kv_idx)'
    >>> mod.callable({})(np.zeros((1, 1, 1, 3)), 0, 0, np.array([[2]]), np.arange(3)).tolist()
    [[[[0.125, 0.0625, 0.0]]]]
    """

    expression: str
    function: Callable[..., Any]
    make_args: Callable[[np.random.Generator, Shape], Args] = lambda rng, shape: {}

    def callable(self, args: Args) -> Callable[..., Any]:
        """Return the Python callable of the five names, with these arguments."""
        return lambda score, b, h, q_idx, kv_idx: self.function(score, b, h, q_idx, kv_idx, **args)


def _lengths(rng: np.random.Generator, shape: Shape) -> Args:
    """Return how many keys each batch entry has: the second has none, so that there are rows that see nothing."""
    lengths = rng.integers(0, shape[3] + 1, shape[0])
    lengths[1:2] = 0
    return {"lengths": lengths.astype(np.int32)}


# The constants are exact in float32, so that both languages compute the same.
SCORE_MODS: dict[str, SampleMod] = {
    "relative": SampleMod(
        "score + 0.0625f * (q_idx - kv_idx)",
        lambda score, b, h, q_idx, kv_idx: score + 0.0625 * (q_idx - kv_idx),
    ),
    "tanh": SampleMod(
        "20.0f * tanhf(score / 20.0f)",
        lambda score, b, h, q_idx, kv_idx: 20.0 * np.tanh(score / 20.0),
    ),
    "square": SampleMod(
        "0.125f * score * score",
        lambda score, b, h, q_idx, kv_idx: 0.125 * score * score,
    ),
    "leaky": SampleMod(
        "score > 0.0f ? score : 0.25f * score",
        lambda score, b, h, q_idx, kv_idx: np.where(score > 0, score, 0.25 * score),
    ),
    "table": SampleMod(
        "score + table(h, kv_idx)",
        lambda score, b, h, q_idx, kv_idx, table: score + table[h, kv_idx],
        lambda rng, shape: {"table": rng.standard_normal((shape[1], shape[3])).astype(np.float32)},
    ),
    "strength": SampleMod(
        "b == 0 ? strength * score : score",
        lambda score, b, h, q_idx, kv_idx, strength: np.where(b == 0, strength * score, score),
        lambda rng, shape: {"strength": 0.75},
    ),
}
MASK_MODS: dict[str, SampleMod] = {
    "stripes": SampleMod(
        "(q_idx + kv_idx + h) % 3 != 0",
        lambda score, b, h, q_idx, kv_idx: (q_idx + kv_idx + h) % 3 != 0,
    ),
    "prefix": SampleMod(
        "kv_idx < prefix || kv_idx <= q_idx",
        lambda score, b, h, q_idx, kv_idx, prefix: (kv_idx < prefix) | (kv_idx <= q_idx),
        lambda rng, shape: {"prefix": 5},
    ),
    "document": SampleMod(
        "document(q_idx) == document(kv_idx)",
        lambda score, b, h, q_idx, kv_idx, document: document[q_idx] == document[kv_idx],
        lambda rng, shape: {"document": np.sort(rng.integers(0, 4, max(shape[2:]))).astype(np.int32)},
    ),
    "padding": SampleMod(
        "kv_idx < lengths(b)",
        lambda score, b, h, q_idx, kv_idx, lengths: kv_idx < lengths[b],
        _lengths,
    ),
}
