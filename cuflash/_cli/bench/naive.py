"""Attention as it is written down: all scores as one matrix, its softmax, its product with V.

Scores and softmax are float32, the weights are rounded to the dtype of the inputs, as in the accuracy rule.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuflash._cli.bench.machine import Machine

Array = Any


def weights(machine: Machine, q: Array, k: Array, causal: bool) -> Array:
    """P, the softmax of the scaled and masked scores."""
    xp = machine.xp
    s = machine.matmul(q, k, transpose_b=True)
    s *= 1 / math.sqrt(q.shape[-1])
    if causal:
        s += xp.where(xp.tri(*s.shape[-2:], dtype=bool), np.float32(0), np.float32(-np.inf))
    s -= s.max(axis=-1, keepdims=True)
    xp.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return s.astype(q.dtype, copy=False)


def forward(machine: Machine, q: Array, k: Array, v: Array, causal: bool) -> Array:
    return machine.matmul(weights(machine, q, k, causal), v, dtype=q.dtype)


def backward(machine: Machine, dout: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, Array, Array]:
    """The gradients, given the weights that the forward pass has kept."""
    dv = machine.matmul(p, dout, transpose_a=True, dtype=q.dtype)
    ds = machine.matmul(dout, v, transpose_b=True)
    ds -= (ds * p).sum(axis=-1, keepdims=True)
    ds *= p
    ds *= 1 / math.sqrt(q.shape[-1])
    ds = ds.astype(q.dtype, copy=False)
    dq = machine.matmul(ds, k, dtype=q.dtype)
    dk = machine.matmul(ds, q, transpose_a=True, dtype=q.dtype)
    return dq, dk, dv
