"""The variants whose speed is measured beside that of plain attention, and how fast they are meant to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

import cuflash
from cuflash._cli.bench.cells import OPS, Cell, Op
from cuflash._cli.bench.contenders import Prepare, attention, operands_of
from cuflash._cli.bench.machine import Array, Machine, dtype_named
from cuflash._cli.bench.timing import Contender


@dataclass(frozen=True)
class Sizes:
    """What the cells of all variants have in common."""

    width: int  # heads * head_dim
    seqlen: int
    batch: int = 4


SIZES = {"gpu": Sizes(width=2048, seqlen=4096), "cpu": Sizes(width=1024, seqlen=256)}

# Programmable scores and masks, as each kind of machine takes them.
SCORE_MOD: dict[str, Any] = {
    "gpu": "score + 0.01f * (q_idx - kv_idx)",
    "cpu": lambda score, b, h, q_idx, kv_idx: score + 0.01 * (q_idx - kv_idx),
}
CAUSAL_MOD: dict[str, Any] = {
    "gpu": "kv_idx <= q_idx",
    "cpu": lambda score, b, h, q_idx, kv_idx: kv_idx <= q_idx,
}
SHOWN_BELOW = 0.8416  # 80 % of normally distributed numbers are less


@dataclass(frozen=True)
class Variant:
    """One option of attention.

    Parameters
    ----------
    name : str
        What records and tables call it.
    bar : float or None
        The least share of the plain rate that is asked for.
    own_bars : mapping
        The same of kernel families of which something else is asked.
    options : callable
        ``options(machine, cell)`` makes the options of a call.
    causal : bool
        Whether plain attention beside it is causal.
    pairs : callable
        The pairs of queries and keys that a cell has to compute.
    gradients : tuple of str
        Options of the backward call alone.
    packed : bool
        Whether the sequences have different lengths and no padding.
    head_dims, stretch, group, ops
        Of the cells: the lengths are ``stretch`` times those of `SIZES`.
    odd : bool
        Whether the lengths are a little less, and multiples of no tile (4033).
    short : int
        How many times as many keys as queries there are.
    """

    name: str
    bar: float | None
    options: Callable[[Machine, Cell], dict[str, Any]]
    causal: bool = False
    pairs: Callable[[Cell], float] = lambda cell: cell.pairs
    gradients: tuple[str, ...] = ()
    packed: bool = False
    head_dims: tuple[int, ...] = (64, 128)
    stretch: int = 1
    group: int = 1
    ops: tuple[Op, ...] = OPS
    odd: bool = False
    short: int = 1
    own_bars: Mapping[str, float] = field(default_factory=dict)

    def bar_of(self, kernel: str) -> float | None:
        return self.own_bars.get(kernel, self.bar)

    def cells(self, sizes: Sizes, dtype: str) -> list[Cell]:
        batch, seqlen = max(1, sizes.batch // self.stretch), sizes.seqlen * self.stretch
        if self.odd:
            seqlen -= seqlen // 65
        keys = seqlen if self.short > 1 else 0
        return [
            Cell(head_dim, self.causal, seqlen // self.short, batch, sizes.width // head_dim, dtype, self.group, keys)
            for head_dim in self.head_dims
        ]

    def plain_cells(self, sizes: Sizes, dtype: str) -> list[Cell]:
        """Those of the plain attention that it is compared with."""
        return replace(self, group=1, odd=False, short=1).cells(sizes, dtype)

    def prepare(self, machine: Machine, op: Op, cell: Cell, kernel: str) -> Prepare:
        """The call with this option, ready to be made ready."""
        return partial(self._contender, machine, op, cell, kernel)

    def _contender(self, machine: Machine, op: Op, cell: Cell, kernel: str) -> Contender:
        options = {**self.options(machine, cell), "kernel": kernel}
        gradients = dict.fromkeys(self.gradients, True)
        if not self.packed:
            return attention(op, operands_of(machine, cell), options, gradients=gradients)
        operands = tuple(x.reshape(cell.batch * cell.seqlen, -1, cell.head_dim) for x in operands_of(machine, cell))
        cu_seqlens = machine.xp.asarray(offsets(cell), np.int32)
        return attention(op, operands, options, cu_seqlens=(cu_seqlens, cu_seqlens), gradients=gradients)


def offsets(cell: Cell) -> list[int]:
    """Where sequences of random lengths begin that have as many tokens as the cell, and half its length on average."""
    total = cell.batch * cell.seqlen
    ends = np.random.default_rng(1).integers(1, cell.seqlen, size=total).cumsum()
    return [0, *ends[ends < total].tolist(), total]


def padded(cell: Cell) -> Cell:
    """The same sequences, each padded to the length of the longest."""
    lengths = np.diff(offsets(cell))
    return replace(cell, batch=len(lengths), seqlen=int(lengths.max()))


def _packed_pairs(cell: Cell) -> float:
    return cell.heads * float((np.diff(offsets(cell)) ** 2).sum()) * (0.5 if cell.causal else 1)


def _window_pairs(share: int, cell: Cell) -> float:
    """Each query sees itself and the keys of the window to its left; the first ones have fewer of them."""
    left = cell.seqlen // share
    return cell.batch * cell.heads * ((left + 1) * cell.seqlen - left * (left + 1) / 2)


def _slopes(machine: Machine, cell: Cell) -> dict[str, Any]:
    slopes = 2.0 ** (-8 * np.arange(1, cell.heads + 1) / cell.heads)
    return {"causal": True, "alibi_slopes": machine.xp.asarray(slopes, np.float32)}


def _bias(machine: Machine, cell: Cell) -> dict[str, Any]:
    """A bias for each head; the same numbers for all, which are not made again."""
    bias = machine.xp.empty((1, cell.heads, cell.seqlen, cell.seqlen), dtype_named(cell.dtype))
    bias[...] = _square(machine, cell)
    return {"bias": bias}


def _mask(machine: Machine, cell: Cell) -> dict[str, Any]:
    return {"mask": (_square(machine, cell) < SHOWN_BELOW)[None, None]}


def _square(machine: Machine, cell: Cell) -> Array:
    return machine.normal((cell.seqlen, cell.seqlen), "float32", 4)


def _sinks(machine: Machine, cell: Cell) -> dict[str, Any]:
    return {"sinks": machine.normal((cell.heads,), "float32", 5)}


def _causal_mod(machine: Machine, cell: Cell) -> dict[str, Any]:
    mask_mod = CAUSAL_MOD[machine.kind]
    shape = (1, 1, cell.seqlen, cell.seqlen)
    return {"mask_mod": mask_mod, "block_mask": cuflash.make_block_mask(mask_mod=mask_mod, shape=shape)}


def _window(name: str, bar: float | None, share: int, own_bars: Mapping[str, float]) -> Variant:
    """A causal window in which a query sees a share of the keys."""
    return Variant(
        name,
        bar,
        lambda machine, cell: {"causal": True, "window_size": (cell.seqlen // share, 0)},
        causal=True,
        pairs=partial(_window_pairs, share),
        stretch=4,
        own_bars=own_bars,
    )


PLAIN = Variant("plain", None, lambda _, cell: {"causal": cell.causal})

_CAUSAL_MOD = Variant("mask_mod", 1 / 1.25, _causal_mod, causal=True)

# Gradients that are the same bits in every run, where the kernel would else add them up in any order.
_DETERMINISTIC = Variant(
    "deterministic",
    None,
    lambda machine, cell: {"causal": cell.causal},
    gradients=("deterministic",),
    ops=("backward",),
)

VARIANTS = (
    Variant("softcap", 0.85, lambda machine, cell: {"softcap": 30.0}),
    Variant("alibi", 0.85, _slopes, causal=True),
    _window("window", 0.85, 16, {"sm90": 0.9}),
    _window("wide_window", None, 4, {}),
    Variant("gqa8", 0.85, lambda machine, cell: {}, group=8),
    Variant("gqa4", None, lambda machine, cell: {}, group=4, own_bars={"sm90": 0.9}),
    Variant("short_q", None, lambda machine, cell: {}, short=4, own_bars={"sm90": 0.9}),
    Variant("odd", None, lambda machine, cell: {}, odd=True, own_bars={"sm90": 0.9}),
    Variant("varlen", 0.85, lambda machine, cell: {"causal": True}, causal=True, pairs=_packed_pairs, packed=True),
    Variant("bias", 0.6, _bias),
    Variant("dbias", 0.6, _bias, gradients=("return_dbias",), ops=("backward",)),
    Variant("mask", 0.6, _mask),
    Variant("dropout", 0.6, lambda machine, cell: {"dropout_p": 0.17, "seed": 7}),
    Variant("sinks", None, _sinks),
    _DETERMINISTIC,
    replace(_DETERMINISTIC, name="deterministic_causal", causal=True),
    Variant("score_mod", None, lambda machine, cell: {"score_mod": SCORE_MOD[machine.kind]}),
    _CAUSAL_MOD,
    replace(_CAUSAL_MOD, head_dims=(128,), stretch=2),
)
