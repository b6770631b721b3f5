"""What is measured: the cells of a sweep, and the floating-point operations that one of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

Op = Literal["forward", "backward"]

OPS: tuple[Op, ...] = ("forward", "backward")
# head_dims and lengths of a sweep; on a CPU such that it takes seconds, not hours.
AXES: dict[tuple[str, str], tuple[list[int], list[int]]] = {
    ("gpu", "cells"): ([64, 128, 256], [512, 1024, 2048, 4096, 8192, 16384]),
    ("gpu", "quick"): ([64, 128], [4096]),
    ("cpu", "cells"): ([64, 128], [512, 1024, 2048, 4096]),
    ("cpu", "quick"): ([64], [512, 2048]),
}

# The cells of a GPU keep these two products constant, so that all of them do comparable work.
TOKENS = 16384  # batch * seqlen
WIDTH = 2048  # heads * head_dim


@dataclass(frozen=True)
class Cell:
    """One self-attention problem: as many queries as keys, as many key/value heads as query heads."""

    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.seqlen, self.head_dim)

    @property
    def fields(self) -> dict[str, Any]:
        """The cell as a record of the results file names it."""
        return {
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "seqlen": self.seqlen,
            "batch": self.batch,
            "heads": self.heads,
            "heads_kv": self.heads,
        }

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"B {self.batch} H {self.heads} S {self.seqlen} D {self.head_dim} {mask} {self.dtype}"


def flops(op: Op, cell: Cell) -> float:
    """Floating-point operations of the products that attention cannot do without.

    Forward: Q K^T and P V, 2 * S * S * D for each head. Backward: five such products. Causal: half.
    """
    forward = 4 * cell.batch * cell.heads * cell.seqlen**2 * cell.head_dim * (0.5 if cell.causal else 1)
    return forward if op == "forward" else 2.5 * forward


def timed_cells(sweep: str, kind: str, dtype: str) -> list[Cell]:
    """The cells whose speed a sweep measures on a "gpu" or a "cpu"."""
    head_dims, seqlens = AXES[kind, sweep]
    cells = []
    for head_dim, causal, seqlen in product(head_dims, (False, True), seqlens):
        batch, heads = (1, 8) if kind == "cpu" else (TOKENS // seqlen, WIDTH // head_dim)
        cells.append(Cell(head_dim, causal, seqlen, batch, heads, dtype))
    return cells


def memory_cells(kind: str, dtype: str) -> list[Cell]:
    """The cells whose peak memory is measured: one batch of 8 causal heads, ever longer."""
    seqlens = [1024 << step for step in range(8)] if kind == "gpu" else [512, 1024, 2048, 4096]
    return [Cell(64, True, seqlen, batch=1, heads=8, dtype=dtype) for seqlen in seqlens]


def small_cell(dtype: str) -> Cell:
    """A call so small that the time on the host is what it costs."""
    return Cell(64, False, 128, batch=1, heads=8, dtype=dtype)
