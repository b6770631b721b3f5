"""The weights of attention with the pattern of their dropout: flash-attn's S_dmask, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._checks import lse_dtype
from .._problem import MAX_HEAD_DIM
from ._options import Array


def signed_weights(
    attend: Callable[..., Array], v: Array, options: dict[str, Any], positions: Array, seqlen_k: int
) -> Array:
    """The weights before dropout of ``attend(v, **options)``, negative where dropped: (..., heads, seqlen_k).

    `positions` holds the place of each row of `v` in its sequence.
    """
    undropped = {**options, "dropout_p": 0.0, "seed": None}
    exact = lse_dtype(str(v.dtype))  # one in which every array library computes
    weights = []
    for start in range(0, max(seqlen_k, 1), MAX_HEAD_DIM):
        # With the columns of the identity matrix for values, the result is the weights.
        column = np.arange(start, start + MAX_HEAD_DIM, like=v)
        identity = (positions[:, None, None] == column).astype(v.dtype)
        values = np.broadcast_to(identity, (*v.shape[:-1], MAX_HEAD_DIM))
        kept = attend(values, **options).astype(exact) != 0
        weight = attend(values, **undropped).astype(exact)
        weights.append(np.where(kept, weight, -weight))
    return np.concatenate(weights, axis=-1)[..., :seqlen_k].astype(v.dtype)
