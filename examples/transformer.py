"""A decoder-only transformer in plain array code, with all gradients by hand.

Each step has the form of ``cuflash.attention_vjp``: a function of arrays gives ``out, vjp``, and ``vjp(dout)`` gives
the gradients of these arrays. So a layer is made of steps, and its vjp of their vjps in the other order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np

import cuflash

try:
    import cupy

    xp: Any = cupy if cupy.cuda.is_available() else np
except ImportError:
    xp = np

Array = Any


def linear(x: Array, w: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """Give x @ w, for x of any number of axes."""

    def vjp(dy: Array) -> tuple[Array, Array]:
        return dy @ w.T, x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

    return x @ w, vjp


def rms_norm(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Scale tokens to a mean square of 1: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467."""
    factor = 1 / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
    y = x * factor

    def vjp(dy: Array) -> Array:
        return factor * (dy - y * (y * dy).mean(axis=-1, keepdims=True))

    return y, vjp


def rotate(x: Array, direction: int = 1) -> tuple[Array, Callable[[Array], Array]]:
    """Turn pairs of numbers in x (batch, sequence, heads, dim) by angles that grow with the position in the sequence.

    Products of turned queries and keys know how far these are apart: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    first, second = xp.split(x, 2, axis=-1)
    slowness = 10000 ** (xp.arange(first.shape[-1], dtype=x.dtype) / first.shape[-1])
    angles = direction * xp.arange(x.shape[1], dtype=x.dtype)[:, None, None] / slowness
    cos, sin = xp.cos(angles), xp.sin(angles)

    def vjp(dy: Array) -> Array:
        return rotate(dy, -direction)[0]

    return xp.concatenate([cos * first - sin * second, sin * first + cos * second], axis=-1), vjp


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Callable[[float], Array]]:
    """Give the mean of -log(softmax(logits)[target])."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_p = logits - xp.log(xp.exp(logits).sum(axis=-1, keepdims=True))
    chosen = xp.eye(logits.shape[-1], dtype=logits.dtype)[targets]

    def vjp(dloss: float) -> Array:
        return dloss / targets.size * (xp.exp(log_p) - chosen)

    return -(chosen * log_p).sum() / targets.size, vjp


Vjp = Callable[[Array], tuple[Array, Array, Array]]  # of a layer: gradients of its input and of its two weights
Layer = Callable[[Array, Array, Array], tuple[Array, Vjp]]


def residual(layer: Layer, x: Array, w_in: Array, w_out: Array) -> tuple[Array, Vjp]:
    """Give x + layer(rms_norm(x))."""
    normed, norm_vjp = rms_norm(x)
    change, layer_vjp = layer(normed, w_in, w_out)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        dnormed, dw_in, dw_out = layer_vjp(dy)
        return dy + norm_vjp(dnormed), dw_in, dw_out

    return x + change, vjp


def mlp(x: Array, w_up: Array, w_down: Array) -> tuple[Array, Vjp]:
    """Let each token think by itself, with squared ReLUs: So et al. 2021, https://arxiv.org/abs/2109.08668."""
    hidden, up_vjp = linear(x, w_up)
    positive = xp.maximum(hidden, 0)
    y, down_vjp = linear(positive * positive, w_down)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        dsquares, dw_down = down_vjp(dy)
        dx, dw_up = up_vjp(2 * positive * dsquares)
        return dx, dw_up, dw_down

    return y, vjp


class GPT:
    """Layers of attention and MLP in turn; the letters' vectors serve at both ends.

    Weights and all arithmetic are float32, only what attention reads and writes is of ``dtype``.
    """

    def __init__(
        self, rng: np.random.Generator, *, num_letters: int, num_layers: int, num_heads: int, width: int, dtype: Any
    ) -> None:
        self.num_heads, self.dtype = num_heads, dtype
        layer = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        shapes = [(num_letters, width), *(layer * num_layers)]
        self.weights = [xp.asarray(rng.normal(0, rows**-0.5, (rows, columns)), np.float32) for rows, columns in shapes]

    def __call__(self, tokens: Array) -> tuple[Array, Callable[[Array], list[Array]]]:
        """Map tokens (batch, sequence) to the logits of the next ones; vjp gives the gradients of the weights."""
        embedding, *weights = self.weights
        # A product with one-hot vectors looks up letters, and its gradient adds in the same order every time.
        x, embedding_vjp = linear(xp.eye(len(embedding), dtype=embedding.dtype)[tokens], embedding)
        vjps = []
        for layer, w_in, w_out in zip(cycle([self.attend, mlp]), weights[::2], weights[1::2], strict=False):
            x, layer_vjp = residual(layer, x, w_in, w_out)
            vjps.append(layer_vjp)
        x, norm_vjp = rms_norm(x)
        logits, head_vjp = linear(x, embedding.T)

        def vjp(dlogits: Array) -> list[Array]:
            dx, dhead = head_vjp(dlogits)
            dx = norm_vjp(dx)
            gradients: list[Array] = []
            for layer_vjp in reversed(vjps):
                dx, dw_in, dw_out = layer_vjp(dx)
                gradients = [dw_in, dw_out, *gradients]
            _, dembedding = embedding_vjp(dx)
            return [dembedding + dhead.T, *gradients]

        return logits, vjp

    def attend(self, x: Array, w_qkv: Array, w_out: Array) -> tuple[Array, Vjp]:
        """Let each token look at those before it."""
        projected, projection_vjp = linear(x, w_qkv)
        q, k, v = xp.split(projected.reshape(*x.shape[:2], 3 * self.num_heads, -1), 3, axis=2)
        (q, q_vjp), (k, k_vjp) = rotate(q), rotate(k)
        q, k, v = (array.astype(self.dtype) for array in (q, k, v))
        heads, attention_vjp = cuflash.attention_vjp(q, k, v, causal=True, layout="bshd")
        y, out_vjp = linear(heads.reshape(x.shape).astype(x.dtype), w_out)

        def vjp(dy: Array) -> tuple[Array, Array, Array]:
            dheads, dw_out = out_vjp(dy)
            dq, dk, dv = attention_vjp(dheads.reshape(heads.shape).astype(self.dtype))
            dq, dk, dv = (array.astype(x.dtype) for array in (dq, dk, dv))
            dprojected = xp.concatenate([q_vjp(dq), k_vjp(dk), dv], axis=2).reshape(projected.shape)
            dx, dw_qkv = projection_vjp(dprojected)
            return dx, dw_qkv, dw_out

        return y, vjp
