"""Train a multi-head attention layer to look things up, with gradients by hand and ``cuflash.attention_vjp``.

    python examples/mha.py

The task is associative recall. A sequence states 16 facts, "key 3 has value 7", and then asks for each key in
some other order. Guessing gives a loss of log 16 = 2.77, attending from each question to its fact gives 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import cuflash

try:
    import cupy

    xp: Any = cupy if cupy.cuda.is_available() else np
except ImportError:
    xp = np

Array = Any
NUM_KEYS, WIDTH, NUM_HEADS, BATCH, STEPS = 16, 64, 4, 32, 90


class MultiHeadAttention:
    """Projections to queries, keys and values, causal attention, and an output projection."""

    def __init__(self, rng: np.random.Generator, width: int, num_heads: int) -> None:
        self.num_heads = num_heads
        self.w_qkv = xp.asarray(rng.normal(0, width**-0.5, (width, 3 * width)), np.float32)
        self.w_out = xp.asarray(rng.normal(0, width**-0.5, (width, width)), np.float32)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], tuple[Array, list[Array]]]]:
        """Map x (batch, sequence, width) to (out, vjp); vjp(dout) gives dx and the weights' gradients."""
        batch, seqlen, width = x.shape
        qkv = (x @ self.w_qkv).reshape(batch, seqlen, 3, self.num_heads, width // self.num_heads)
        heads, attention_vjp = cuflash.attention_vjp(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal=True, layout="bshd"
        )
        heads = heads.reshape(x.shape)

        def vjp(dout: Array) -> tuple[Array, list[Array]]:
            dheads = (dout @ self.w_out.T).reshape(batch, seqlen, self.num_heads, -1)
            dqkv = xp.stack(attention_vjp(dheads), axis=2).reshape(batch, seqlen, 3 * width)
            return dqkv @ self.w_qkv.T, [gradient(x, dqkv), gradient(heads, dout)]

        return heads @ self.w_out, vjp


def gradient(x: Array, dy: Array) -> Array:
    """Give the gradient of W in y = x @ W."""
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


class Adam:
    """Kingma and Ba 2014, https://arxiv.org/abs/1412.6980, updating parameters in place."""

    def __init__(self, parameters: list[Array], rate: float) -> None:
        self.parameters, self.rate, self.step = parameters, rate, 0
        self.moments = [(xp.zeros_like(p), xp.zeros_like(p)) for p in parameters]

    def update(self, gradients: list[Array]) -> None:
        """Take one step."""
        self.step += 1
        rate = self.rate * (1 - 0.999**self.step) ** 0.5 / (1 - 0.9**self.step)
        for parameter, g, (first, second) in zip(self.parameters, gradients, self.moments, strict=True):
            first += 0.1 * (g - first)
            second += 0.001 * (g * g - second)
            parameter -= rate * first / (xp.sqrt(second) + 1e-8)


def facts_and_questions(rng: np.random.Generator) -> tuple[Array, Array]:
    """Make tokens (batch, sequence, keys + values), one-hot in each part, and the one-hot answers."""
    keys, order = (np.argsort(rng.random((BATCH, NUM_KEYS))) for _ in range(2))
    values = rng.integers(NUM_KEYS, size=(BATCH, NUM_KEYS))
    one_hot = np.eye(NUM_KEYS, dtype=np.float32)
    facts = np.concatenate([one_hot[keys], one_hot[values]], axis=-1)
    questions = np.take_along_axis(facts, order[..., None], axis=1)
    answers = questions[..., NUM_KEYS:].copy()
    questions[..., NUM_KEYS:] = 0
    return xp.asarray(np.concatenate([facts, questions], axis=1)), xp.asarray(answers)


def main() -> int:
    """Train; 1 if the layer did not learn to look things up."""
    rng = np.random.default_rng(0)
    layer = MultiHeadAttention(rng, WIDTH, NUM_HEADS)
    embedding = xp.asarray(rng.normal(0, 1, (2 * NUM_KEYS, WIDTH)), np.float32)
    readout = xp.asarray(rng.normal(0, WIDTH**-0.5, (WIDTH, NUM_KEYS)), np.float32)
    adam = Adam([embedding, readout, layer.w_qkv, layer.w_out], rate=2e-3)
    for step in range(STEPS + 1):
        tokens, answers = facts_and_questions(rng)
        hidden, vjp = layer(tokens @ embedding)
        asked = hidden[:, NUM_KEYS:]
        logits = asked @ readout
        logits -= logits.max(axis=-1, keepdims=True)
        log_p = logits - xp.log(xp.exp(logits).sum(axis=-1, keepdims=True))
        loss = -float((answers * log_p).sum()) / (BATCH * NUM_KEYS)
        if step % 6 == 0:
            print(f"step {step:3}  loss {loss:.3f}  {'#' * round(16 * loss)}")
        dlogits = (xp.exp(log_p) - answers) / (BATCH * NUM_KEYS)
        dhidden = xp.zeros_like(hidden)
        dhidden[:, NUM_KEYS:] = dlogits @ readout.T
        dx, layer_gradients = vjp(dhidden)
        adam.update([gradient(tokens, dx), gradient(asked, dlogits), *layer_gradients])
    return 0 if loss < 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
