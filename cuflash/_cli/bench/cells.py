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

# Plain attention, FlashAttention-1 and FlashAttention-2, by the families that compute them.
HISTORY: dict[Op, tuple[str, ...]] = {"forward": ("naive", "fa1", "wmma"), "backward": ("naive", "wmma")}

# The cells of a GPU keep these two products constant, so that all of them do comparable work.
TOKENS = 16384  # batch * seqlen
WIDTH = 2048  # heads * head_dim


@dataclass(frozen=True)
class Cell:
    """One problem: `seqlen` queries and as many keys, or `keys`; `group` query heads share a key/value head."""

    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    dtype: str
    group: int = 1
    keys: int = 0  # if other than the queries

    @property
    def heads_kv(self) -> int:
        return self.heads // self.group

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.seqlen, self.head_dim)

    @property
    def shape_kv(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads_kv, self.keys or self.seqlen, self.head_dim)

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that see each other, over batch and heads; half of all if causal."""
        return self.batch * self.heads * self.seqlen * (self.keys or self.seqlen) * (0.5 if self.causal else 1)

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
            "heads_kv": self.heads_kv,
        }

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"B {self.batch} H {self.heads} S {self.seqlen} D {self.head_dim} {mask} {self.dtype}"


def flops(op: Op, cell: Cell, pairs: float | None = None) -> float:
    """Floating-point operations of the products that attention cannot do without.

    Forward: Q K^T and P V, 2 * D for each of the pairs, by default those of the cell. Backward: five such products.
    """
    forward = 4 * (cell.pairs if pairs is None else pairs) * cell.head_dim
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


def history_cells(dtype: str) -> list[Cell]:
    """The cells on which plain attention, FlashAttention-1 and FlashAttention-2 are compared."""
    return [
        Cell(64, False, seqlen, batch=TOKENS // seqlen, heads=WIDTH // 64, dtype=dtype)
        for seqlen in (256 << step for step in range(7))
    ]


def small_cell(dtype: str) -> Cell:
    """A call so small that the time on the host is what it costs."""
    return Cell(64, False, 128, batch=1, heads=8, dtype=dtype)
