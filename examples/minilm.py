"""all-MiniLM-L6-v2 in plain array code: a BERT of 6 layers that turns a sentence into a vector of length 1.

Sentences of like meaning point the same way. Runs in float16 on a GPU, else in float32 on the CPU.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cuflash

try:
    import cupy

    xp: Any = cupy if cupy.cuda.is_available() else np
except ImportError:
    xp = np

Array = Any
DTYPE = np.dtype(np.float32 if xp is np else np.float16)
NUM_LAYERS, NUM_HEADS, WIDTH = 6, 12, 384


class SentenceEncoder:
    """The model in a directory with ``model.safetensors`` and ``tokenizer.json``.

    ``attention(q, k, v)`` works on arrays (batch, sequence, heads, head_dim).
    """

    def __init__(self, directory: Path, attention: Callable[[Array, Array, Array], Array]) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        weights = load_file(directory / "model.safetensors")
        self.weights = {name: xp.asarray(array.astype(DTYPE)) for name, array in weights.items()}
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.attention = attention

    def encode(self, sentences: list[str]) -> Array:
        """Embed sentences as rows. Those with the same number of tokens share a batch: no padding at all."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(sentences)]
        groups = defaultdict(list)
        for index, ids in enumerate(tokens):
            groups[len(ids)].append(index)
        embeddings = xp.empty((len(sentences), WIDTH), np.float32)
        for group in groups.values():
            embeddings[xp.asarray(group)] = self.encode_group(xp.asarray([tokens[i] for i in group]))
        return embeddings

    def encode_group(self, ids: Array) -> Array:
        """Embed sentences of the same length, given as token ids (batch, sequence)."""
        x = self.weights["embeddings.word_embeddings.weight"][ids]
        x += self.weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.normalize(x, "embeddings.LayerNorm")
        for number in range(NUM_LAYERS):
            layer = f"encoder.layer.{number}"
            x = self.normalize(x + self.attend(x, f"{layer}.attention"), f"{layer}.attention.output.LayerNorm")
            hidden = gelu(self.project(x, f"{layer}.intermediate.dense"))
            x = self.normalize(x + self.project(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        mean = x.astype(np.float32).mean(axis=1)
        return mean / xp.linalg.norm(mean, axis=1, keepdims=True)

    def attend(self, x: Array, name: str) -> Array:
        """Let each token of a sentence look at all of them. No transposes: the heads stay where they are."""
        heads = (*x.shape[:2], NUM_HEADS, WIDTH // NUM_HEADS)
        q, k, v = (self.project(x, f"{name}.self.{part}").reshape(heads) for part in ("query", "key", "value"))
        return self.project(self.attention(q, k, v).reshape(x.shape), f"{name}.output.dense")

    def project(self, x: Array, name: str) -> Array:
        """Multiply by a matrix and add a bias."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normalize(self, x: Array, name: str) -> Array:
        """Layer normalization, in float32."""
        x = x.astype(np.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x.astype(DTYPE) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """Multiply x by the normal distribution function at x; erf by Abramowitz and Stegun 7.1.26, to 1.5e-7."""
    x = x.astype(np.float32)
    z = abs(x) * 0.5**0.5
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return (0.5 * x * (1 + xp.copysign(1 - series * xp.exp(-z * z), x))).astype(DTYPE)


class TimedAttention:
    """``cuflash.attention``, and how long it took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        start = now()
        out = cuflash.attention(q, k, v, layout="bshd")
        self.seconds += now() - start
        return out


def now() -> float:
    """Tell the time in seconds, once all that was asked of the GPU is done."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    return time.perf_counter()
