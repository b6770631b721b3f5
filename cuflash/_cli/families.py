"""Which kernel families can run on which GPU, and why the others cannot."""

from __future__ import annotations

from cuflash._device import Chip
from cuflash._launch import FAMILIES
from cuflash._problem import Problem, Window

DTYPES = ("float16", "bfloat16", "float32")

# Compute capabilities that people have, with the shared memory that a block may use there.
CAPABILITIES = {
    (7, 0): 96 << 10,
    (7, 5): 64 << 10,
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}


def known_chips() -> list[Chip]:
    """A chip of every compute capability of `CAPABILITIES`."""
    return [Chip(f"sm_{major}{minor}", (major, minor), size) for (major, minor), size in CAPABILITIES.items()]


def problem_of(dtype: str, head_dim: int) -> Problem:
    """A problem of usual size."""
    return Problem(
        dtype=dtype,
        batch=1,
        num_heads=8,
        num_heads_kv=8,
        seqlen_q=4096,
        seqlen_k=4096,
        head_dim=head_dim,
        head_dim_v=head_dim,
        softmax_scale=head_dim**-0.5,
        window=Window.of(causal=True, window_size=None),
    )


def obstacles(dtype: str, chip: Chip, *, head_dim: int = 128, backward: bool = False) -> dict[str, str | None]:
    """For each family why it cannot run on a chip, or compute gradients there; None if it can."""
    problem = problem_of(dtype, head_dim)
    return {
        name: family.why_not(problem, dtype, chip) or (family.why_no_backward(problem, chip) if backward else None)
        for name, family in FAMILIES.items()
    }
