"""Few queries, shared keys: the query heads of a key/value head become rows of one tile.

A decoding step has one query a head, and a tile has room for 64 or more. In a tile of their own, each head of a group
reads the keys and values that it shares with the others once more; together they read them once. No kernel knows of it:
it is another way to see the same arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ._problem import FULL, Operand, Problem

TILE = 64
"""So many queries of a head fill a tile on their own."""

ARRAYS = {"q", "k", "v", "out", "lse"}
OF_QUERIES = ("q", "out", "lse")


def heads_as_rows(problem: Problem, operands: Mapping[str, Operand]) -> tuple[Problem, Mapping[str, Operand]]:
    """The same problem with the queries of a group as those of one head, where that is possible and worth it.

    All queries must see the same keys, nothing may depend on the head or the position of a query, and the queries of
    the heads must follow each other in memory.
    """
    band, rows = problem.band, problem.seqlen_q
    sees_all = band.end >= problem.seqlen_k and band.begin + rows <= 1
    alike = set(operands) == ARRAYS and problem.mod is None and problem.dropout_p == 0.0 and not problem.packed
    if problem.group_size == 1 or not 0 < rows < TILE or not sees_all or not alike:
        return problem, operands
    if not all(_follow_each_other(operands[name]) for name in OF_QUERIES):
        return problem, operands
    fewer = {name: _joined(operands[name], problem.group_size) for name in OF_QUERIES}
    heads, rows = problem.num_heads_kv, problem.group_size * rows
    return replace(problem, num_heads=heads, seqlen_q=rows, window=FULL), {**operands, **fewer}


def _follow_each_other(array: Operand) -> bool:
    """Whether one step leads from the last row of a head to the first of the next, as from row to row."""
    rows = array.shape[2]
    return rows == 1 or array.strides[1] == rows * array.strides[2]


def _joined(array: Operand, group_size: int) -> Operand:
    batch, heads, rows, cols = array.shape
    of_batch, of_head, of_row, of_col = array.strides
    return array._replace(
        shape=(batch, heads // group_size, group_size * rows, cols),
        strides=(of_batch, group_size * of_head, of_head if rows == 1 else of_row, of_col),
    )
