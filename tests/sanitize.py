"""A small set of calls for NVIDIA's compute-sanitizer, each checked against the reference.

``compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize``, and likewise ``racecheck`` and
``synccheck``. CuPy's memory pool is off, so that each array is an allocation whose ends memcheck knows.
"""

from __future__ import annotations

import cupy

import cuflash
from cuflash.testing import assert_attention_accurate, assert_gradients_accurate
from cuflash.testing.strategies import AttentionProblem

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


def main() -> None:
    """Run and check everything once."""
    cupy.cuda.set_allocator(None)
    for problem in PROBLEMS:
        q, k, v = problem.arrays(cupy)
        dout = problem.dout(cupy)
        out, lse = cuflash.attention(q, k, v, return_lse=True, **problem.options)
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **problem.options)
        assert_attention_accurate(q, k, v, out, lse, **problem.options)
        assert_gradients_accurate(dout, q, k, v, *gradients, **problem.options)
    print(f"{len(PROBLEMS)} problems, forward and backward: right")


if __name__ == "__main__":
    main()
