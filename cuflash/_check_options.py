"""Checking the options that change scores and weights, and the arrays that come with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import _checks
from ._problem import BLOCK_SIZE, WORD_BITS, Operand, Problem, ceil_div

MIN_SOFTCAP, MAX_SOFTCAP = 1e-30, 1e30
"""Between these, a score divided by the cap does not vanish where GPUs flush denormals to 0."""


def softcap(value: Any, dtype: str) -> float | None:
    if value is None:
        return None
    if not _checks.is_real(value):
        raise TypeError(f"softcap: got {value!r} of type {type(value).__name__}; allowed are None and a real number")
    limits = np.finfo(_checks.lse_dtype(dtype))
    least, most = float(limits.tiny), float(limits.max)
    if dtype != "float64":
        least, most = MIN_SOFTCAP, MAX_SOFTCAP
    if not least <= _checks.comparable(value) <= most:
        raise ValueError(f"softcap: got {value!r}; allowed are None and numbers > 0 ({least:.4g} to {most:.4g})")
    return float(value)


def dropout_p(value: Any, *, has_seed: bool) -> float:
    if not _checks.is_real(value):
        raise TypeError(f"dropout_p: got {value!r} of type {type(value).__name__}; allowed are numbers in [0, 1)")
    if not 0 <= _checks.comparable(value) < 1:
        raise ValueError(f"dropout_p: got {value!r}; allowed are numbers in [0, 1)")
    if value > 0 and not has_seed:
        raise ValueError(
            f"seed: got None with dropout_p={value!r}; allowed are an int in [0, 2**64) and a uint64 array"
        )
    return float(value)


def is_seed_number(value: Any) -> bool:
    """Whether a seed is a number rather than an array; what is neither, or out of range, is refused."""
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "dtype")):
        raise TypeError(
            f"seed: got {value!r} of type {type(value).__name__}; allowed are None, an int in [0, 2**64) and an array "
            "of one uint64"
        )
    if not isinstance(value, (int, np.integer)):
        return False
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: got {value!r}; an int must be in [0, 2**64)")
    return True


def seed_array(array: Any) -> None:
    if str(array.dtype) != "uint64":
        raise TypeError(f"seed: dtype is {array.dtype}; an array must be uint64")
    if array.size != 1:
        raise ValueError(f"seed: shape is {array.shape}; an array must have one element")


def gradient_flags(given: Any, *, return_dbias: Any, return_dsinks: Any, deterministic: Any) -> None:
    """Refuse what is no flag, and gradients of arrays that are not among the names `given`."""
    for name, value in (("dbias", return_dbias), ("dsinks", return_dsinks)):
        _checks.flag(f"return_{name}", value)
        if value and name[1:] not in given:
            raise ValueError(f"return_{name}: got True without {name[1:]}; it must be False where {name[1:]} is None")
    _checks.flag("deterministic", deterministic)


def operands(problem: Problem, metas: dict[str, Any]) -> dict[str, Operand]:
    """The arrays beside q, k and v, by name, as the operands that backends take."""
    return {name: OPERANDS[name](name, meta, problem) for name, meta in metas.items() if name in OPERANDS}


def unbroadcast(name: str, meta: Any) -> Operand:
    """The array as 4 axes, by the rules of broadcasting."""
    return Operand.of(meta.shape, _checks.element_strides(name, meta), dtype=str(meta.dtype))


def per_head(name: str, meta: Any) -> Operand:
    """The array of shape (Hq,) or (B, Hq) as (batch, heads, 1, 1)."""
    strides = _checks.element_strides(name, meta)
    return Operand.of((*meta.shape, 1, 1), (*strides, 0, 0), dtype=str(meta.dtype))


def _dtype(name: str, meta: Any, *allowed: str) -> None:
    if str(meta.dtype) not in allowed:
        listed = " and ".join(dict.fromkeys(allowed))
        raise TypeError(f"{name}: dtype {meta.dtype} is not supported here; allowed: {listed}")


def fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to the full one."""
    tail = full[max(0, len(full) - len(shape)) :]
    return len(shape) == len(tail) and all(size in (1, new) for size, new in zip(shape, tail, strict=True))


def _pairwise(name: str, meta: Any, full: tuple[int, int, int, int]) -> Operand:
    if not fits(meta.shape, full):
        raise ValueError(
            f"{name}: shape {meta.shape} does not broadcast to {full}, which is (batch, heads, queries, keys)"
        )
    return unbroadcast(name, meta).broadcast_to(full)


def _scores_shape(problem: Problem) -> tuple[int, int, int, int]:
    return problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k


def _bias(name: str, meta: Any, problem: Problem) -> Operand:
    _dtype(name, meta, problem.dtype, "float32")
    return _pairwise(name, meta, _scores_shape(problem))


def _mask(name: str, meta: Any, problem: Problem) -> Operand:
    _dtype(name, meta, "bool")
    return _pairwise(name, meta, _scores_shape(problem))


def _alibi_slopes(name: str, meta: Any, problem: Problem) -> Operand:
    _dtype(name, meta, "float32")
    batch, heads = problem.batch, problem.num_heads
    if meta.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(f"{name}: shape is {meta.shape}; allowed are {(heads,)} and {(batch, heads)}")
    return per_head(name, meta).broadcast_to((batch, heads, 1, 1))


def _sinks(name: str, meta: Any, problem: Problem) -> Operand:
    _dtype(name, meta, problem.dtype, "float32")
    _checks.same_shape(name, meta, (problem.num_heads,))
    return per_head(name, meta).broadcast_to((problem.batch, problem.num_heads, 1, 1))


def _block_mask(name: str, meta: Any, problem: Problem) -> Operand:
    """The bits of a block mask, one for each block of keys in rows of words."""
    seqlens = problem.seqlen_q, problem.seqlen_k
    if meta.shape != seqlens:
        raise ValueError(f"{name}: is for {meta.shape} queries and keys, but the call has {seqlens}")
    rows, columns = (ceil_div(seqlen, BLOCK_SIZE) for seqlen in seqlens)
    full = (problem.batch, problem.num_heads, rows, columns)
    batch, heads, *blocks = unbroadcast(name, meta.visible).shape
    if blocks != [rows, columns] or not fits((batch, heads), full[:2]):
        raise ValueError(f"{name}: the shape of its blocks, {meta.visible.shape}, does not broadcast to {full}")
    words = max(1, ceil_div(columns, WORD_BITS))
    bits = Operand((batch, heads, rows, words), (heads * rows * words, rows * words, words, 1), "uint32")
    return bits.broadcast_to((*full[:2], rows, words))


def _offsets(name: str, meta: Any, problem: Problem) -> Operand:
    return _lengths(name, meta, size=problem.batch + 1)


def _seqused(name: str, meta: Any, problem: Problem) -> Operand:
    return _lengths(name, meta, size=problem.batch)


def _lengths(name: str, meta: Any, size: int) -> Operand:
    _dtype(name, meta, "int32")
    _checks.same_shape(name, meta, (size,))
    if size > 1 and meta.strides != (meta.dtype.itemsize,):
        raise ValueError(f"{name}: strides are {meta.strides}; it must be contiguous: copy it first, with x.copy()")
    return unbroadcast(name, meta)


OPERANDS: dict[str, Callable[[str, Any, Problem], Operand]] = {
    "bias": _bias,
    "mask": _mask,
    "alibi_slopes": _alibi_slopes,
    "sinks": _sinks,
    "block_mask": _block_mask,
    "cu_seqlens_q": _offsets,
    "cu_seqlens_k": _offsets,
    "seqused_k": _seqused,
}


GRADIENT_OPERANDS: dict[str, Callable[[str, Any], Operand]] = {"dbias": unbroadcast, "dsinks": per_head}


def num_sequences(cu_seqlens_q: Any) -> int:
    """How many packed sequences the offsets of this shape tell."""
    shape = cu_seqlens_q.shape
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"cu_seqlens_q: shape is {shape}; it must be (number of sequences + 1,)")
    size: int = shape[0]
    return size - 1


def offset_values(total_q: int, total_k: int, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_k: Any = None) -> None:
    """Refuse offsets, on the host, that do not cut the packed arrays into sequences."""
    totals = {"cu_seqlens_q": (cu_seqlens_q, total_q), "cu_seqlens_k": (cu_seqlens_k, total_k)}
    for name, (offsets, total) in totals.items():
        least = np.concatenate([[0], offsets[:-1]])  # the one before
        most = np.where(np.arange(len(offsets)) == 0, 0, total)
        _checks.within(name, offsets, least, most, f"it starts with 0, never decreases, and ends at most at {total}")
    if seqused_k is not None:
        _checks.within("seqused_k", seqused_k, 0, np.diff(cu_seqlens_k), "at most the length of the sequence")
