"""cuflash and Numba on one memory: rotary embeddings in place, then attention. Run python examples/numba_bridge.py."""

import math
from importlib import import_module, util
from typing import Any

import numpy as np
from numba import cuda, njit

import cuflash

xp: Any = import_module("cupy" if cuda.is_available() and util.find_spec("cupy") else "numpy")


def rotate_pair(x: Any, pair: int, start: int, direction: int) -> None:
    """Turn two numbers of x (batch, sequence, heads, dim) by an angle that grows with the position (RoFormer)."""
    half = x.shape[3] // 2
    row, h, d = pair // (half * x.shape[2]), pair // half % x.shape[2], pair % half
    b, i = row // x.shape[1], row % x.shape[1]
    angle = direction * (start + i) * 10000.0 ** (-d / half)
    first, second = x[b, i, h, d], x[b, i, h, d + half]
    x[b, i, h, d] = math.cos(angle) * first - math.sin(angle) * second
    x[b, i, h, d + half] = math.sin(angle) * first + math.cos(angle) * second


if xp is np:
    rotate_on_cpu = njit(rotate_pair)

    @njit
    def rotate(x: Any, start: int, direction: int) -> None:
        for pair in range(x.size // 2):
            rotate_on_cpu(x, pair, start, direction)
else:  # Numba takes CuPy's arrays as they are, by their __cuda_array_interface__
    rotate_on_gpu = cuda.jit(rotate_pair, device=True)

    @cuda.jit
    def rotate_kernel(x: Any, start: int, direction: int) -> None:
        for pair in range(cuda.grid(1), x.size // 2, cuda.gridsize(1)):
            rotate_on_gpu(x, pair, start, direction)

    rotate = rotate_kernel[1024, 256]


def attend(qkv: Any, dout: Any, start: int) -> Any:
    """Rotate q and k inside qkv (batch, sequence, 3, heads, dim); give out and the gradients before rotation."""
    q, k, v = (qkv[:, :, i] for i in range(3))
    rotate(q, start, 1)
    rotate(k, start, 1)
    out, vjp = cuflash.attention_vjp(q, k, v, causal=True, layout="bshd")
    dq, dk, dv = vjp(dout)
    rotate(dq, start, -1)
    rotate(dk, start, -1)
    return out, dq, dk, dv


if __name__ == "__main__":
    qkv, dout = (xp.asarray(np.random.default_rng(0).normal(size=(2, 99, n, 4, 64)), np.float32) for n in (3, 1))
    results = (attend(qkv.copy(), dout[:, :, 0], start) for start in (0, 1000))
    for name, x, y in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        print(f"{xp.__name__}: {name} differs from that 1000 positions further on by at most {abs(x - y).max():.1e}")
