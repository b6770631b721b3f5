"""A small set of calls for NVIDIA's compute-sanitizer, each checked against the reference.

``compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize``, and likewise ``racecheck``,
``synccheck`` and ``initcheck``. CuPy's memory pool is off, and inputs are copied, so that each is an allocation whose
ends memcheck knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cupy
import numpy as np

import cuflash
from cuflash.testing import (
    assert_attention_accurate,
    assert_attention_varlen_accurate,
    assert_gradients_accurate,
    assert_gradients_varlen_accurate,
)
from cuflash.testing.strategies import AttentionProblem, PackedProblem, PairArray

PROBLEMS = [
    AttentionProblem((2, 65, 64), (1, 130, 64), (1, 130, 64), dtype, causal=causal, window_size=window)
    for dtype in ("float16", "bfloat16", "float32")
    for causal, window in ((False, None), (True, None), (False, (20, 5)))
] + [
    AttentionProblem((1, 70, 40), (1, 33, 40), (1, 33, 17), "float16"),  # rows that are no multiple of 16 bytes
    AttentionProblem((1, 33, 128), (1, 70, 128), (1, 70, 128), "bfloat16", causal=True),
    AttentionProblem((33, 1, 192), (70, 1, 192), (70, 1, 128), "float16", layout="bshd"),
    AttentionProblem((1, 17, 256), (1, 33, 256), (1, 33, 256), "float32"),
    AttentionProblem((1, 5, 8), (1, 0, 8), (1, 0, 8), "float16"),
]

SHAPES = ((2, 2, 130, 64), (2, 1, 200, 64), (2, 1, 200, 64))
VARIANTS = [
    AttentionProblem(*SHAPES, "bfloat16", causal=True, softcap=5.0, alibi="batch", sinks="float32", with_dlse=True),
    AttentionProblem(*SHAPES, "float16", bias=PairArray((2, 130, 200)), mask=PairArray((2, 1, 130, 200), hidden=0.3)),
    AttentionProblem(*SHAPES, "float32", bias=PairArray((1, 200)), dropout_p=0.2),
    AttentionProblem(*SHAPES, "float16", score_mod="table", mask_mod="document", block_mask=True),
    AttentionProblem(
        (1, 130, 128), (1, 200, 128), (1, 200, 128), "bfloat16", bias=PairArray((130, 200)), dropout_p=0.1
    ),
    AttentionProblem((1, 129, 8), (1, 200, 8), (1, 200, 24), "float16", bias=PairArray((129, 200))),
]
PACKED = [
    PackedProblem(
        (3, 0, 130), (4, 65, 70), heads=(2, 1), head_dims=(64, 64), tails=(9, 3), dtype="float16", causal=True
    ),
    PackedProblem((70, 33), (70, 40), (5, 40), head_dims=(64, 32), dtype="bfloat16", sinks="float32", dropout_p=0.2),
]

# For each tuned family: more jobs than multiprocessors, several tiles of keys, and every kind of pairs.
LONG = {head_dim: ((64, 300, head_dim), (32, 400, head_dim), (32, 400, head_dim)) for head_dim in (64, 128)}
LARGE = [
    AttentionProblem(*LONG[64], "bfloat16", causal=True),
    AttentionProblem(*LONG[128], "float16", causal=True),
    AttentionProblem((4, 300, 256), (4, 400, 256), (4, 400, 256), "bfloat16", causal=True),
    AttentionProblem((300, 4, 192), (400, 4, 192), (400, 4, 128), "bfloat16", layout="bshd", window_size=(100, 20)),
    AttentionProblem(
        (2, 300, 128), (1, 400, 128), (1, 400, 128), "bfloat16", bias=PairArray((2, 300, 400)),
        mask=PairArray((300, 400), hidden=0.3),
    ),
    AttentionProblem((2, 300, 128), (1, 400, 128), (1, 400, 128), "bfloat16", causal=True, dropout_p=0.2),
    AttentionProblem((2, 300, 64), (2, 300, 64), (2, 300, 64), "float16", mask_mod="document", block_mask=True),
]  # fmt: skip
LARGE_PACKED = [
    PackedProblem(
        (30, 0, 300, 129), (90, 5, 400, 260), heads=(4, 2), head_dims=(head_dim, head_dim), tails=(7, 9),
        dtype="bfloat16", causal=True,
    )
    for head_dim in (64, 128)
]  # fmt: skip


def copies(arrays: Iterable[Any]) -> Any:
    """Copy arrays to the GPU, each to memory of its own."""
    return [cupy.asarray(x) for x in arrays]


def check(kernel: str, problem: AttentionProblem | PackedProblem, *, poison: bool = False) -> None:
    """Run a family forward and backward, in any order and in a fixed one.

    With NaN in a value that only the last rows of a causal problem see, if asked for.
    """
    packed, options = isinstance(problem, PackedProblem), problem.options_for(cupy, "expression")
    q, k, v, *cu_seqlens = problem.arrays()
    if poison:
        v[..., -5, 3] = np.nan
    dout, q, k, v, *cu_seqlens = copies((problem.dout(), q, k, v, *cu_seqlens))
    forward = cuflash.attention_varlen if packed else cuflash.attention
    backward = cuflash.attention_varlen_backward if packed else cuflash.attention_backward
    assert_forward = assert_attention_varlen_accurate if packed else assert_attention_accurate
    assert_backward = assert_gradients_varlen_accurate if packed else assert_gradients_accurate
    out, lse = forward(q, k, v, *cu_seqlens, kernel=kernel, return_lse=True, **options)
    assert_forward(q, k, v, *cu_seqlens, out, lse, **problem.options)
    for deterministic in (False, True):
        arrays = dout, q, k, v, out, lse, *cu_seqlens
        gradients = backward(*arrays, kernel=kernel, deterministic=deterministic, **options)
        assert_backward(dout, q, k, v, *cu_seqlens, *gradients, **problem.options)


def check_family(kernel: str) -> None:
    """Run the large problems on a tuned family."""
    for problem in (*LARGE, *LARGE_PACKED):
        check(kernel, problem)
    for problem in LARGE[:2]:
        check(kernel, problem, poison=True)
    print(f"{len(LARGE) + len(LARGE_PACKED) + 2} problems on the family {kernel}, forward and backward: right")


def main() -> None:
    """Run and check everything once."""
    cupy.cuda.set_allocator(None)
    for problem in (*PROBLEMS, *VARIANTS):
        options = problem.options_for(cupy, "expression")
        inputs, dout, dlse = copies(problem.arrays()), cupy.asarray(problem.dout()), problem.dlse(cupy)
        wanted = {"return_dbias": "bias" in options, "return_dsinks": "sinks" in options}
        (out, lse), vjp = cuflash.attention_vjp(*inputs, **options, **wanted, return_lse=True)
        dq, dk, dv, *others = vjp(dout, dlse)
        asked = [name for name in ("bias", "sinks") if name in options]
        gradients = {f"d{name}": gradient for name, gradient in zip(asked, others, strict=True)}
        assert_attention_accurate(*inputs, out, lse, **problem.options)
        dlse = {} if dlse is None else {"dlse": dlse}
        assert_gradients_accurate(dout, *inputs, dq, dk, dv, **problem.options, **gradients, **dlse)
    for packed in PACKED:
        options, inputs = packed.options_for(cupy, "expression"), copies(packed.arrays())
        dout = cupy.asarray(packed.dout())
        (out, lse), vjp = cuflash.attention_varlen_vjp(*inputs, **options, return_lse=True)
        assert_attention_varlen_accurate(*inputs, out, lse, **packed.options)
        assert_gradients_varlen_accurate(dout, *inputs, *vjp(dout), **packed.options)
    print(f"{len(PROBLEMS) + len(VARIANTS) + len(PACKED)} problems, forward and backward: right")
    capability = int(cupy.cuda.Device().compute_capability)
    for kernel, able in (("sm80", capability >= 80), ("sm90", capability == 90)):
        if able:
            check_family(kernel)


if __name__ == "__main__":
    main()
