"""cuflash in JAX: a custom_vjp on XLA's own buffers, under jit or not. Run python examples/jax_bridge.py."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

import cuflash


def on_arrays(function: Any) -> Any:
    """Let JAX call ``function(results, *inputs)`` with arrays on XLA's memory, to write the results."""

    def callback(ctx: Any, results: Any, *inputs: Any) -> None:
        array, stream = np.asarray, nullcontext()
        if inputs[0].__dlpack_device__()[0] != 1:  # 1: in host memory
            import cupy

            array, handle = cupy.from_dlpack, SimpleNamespace(__cuda_stream__=lambda: (0, ctx.stream))
            stream = cupy.cuda.Stream.from_external(handle)
        with stream:
            function([*map(array, results)], *map(array, inputs))

    return lambda shapes, *inputs: buffer_callback(callback, shapes, vmap_method="sequential")(*inputs)


def make_attention(**options: Any) -> Any:
    """Make attention(q, k, v) on (batch, sequence, heads, dim) with options of ``cuflash.attention``, but no arrays."""
    options["layout"] = "bshd"

    @on_arrays
    def write_out(results: Any, *qkv: Any) -> None:
        results[1][...] = cuflash.attention(*qkv, out=results[0], return_lse=True, **options)[1]

    @on_arrays
    def write_gradients(results: Any, *arrays: Any) -> None:
        for result, gradient in zip(results, cuflash.attention_backward(*arrays, **options), strict=True):
            result[...] = gradient  # a copy, like that of lse: XLA allocates its results, and so does cuflash

    def forward(q: Any, k: Any, v: Any) -> Any:
        out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
        lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), np.promote_types(q.dtype, np.float32))
        out, lse = write_out([out, lse], q, k, v)
        return out, (q, k, v, out, lse)

    attention = jax.custom_vjp(lambda q, k, v: forward(q, k, v)[0])
    attention.defvjp(forward, lambda saved, dout: tuple(write_gradients([*saved[:3]], dout, *saved)))
    return attention


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    q, k, v, dout = (jax.random.normal(jax.random.key(i), (2, 128, h, 64)) for i, h in enumerate((8, 2, 2, 8)))
    ours = jax.vjp(jax.jit(make_attention(causal=True)), q, k, v)[1](dout)
    theirs = jax.vjp(lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=True), q, k, v)[1](dout)
    for name, x, y in zip(("dq", "dk", "dv"), ours, theirs, strict=True):
        print(f"{x.device}: {name} differs from JAX's by at most {abs(x - y).max():.1e}")
