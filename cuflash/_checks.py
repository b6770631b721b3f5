"""Checking arguments, before anything is allocated or launched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._problem import MAX_HEAD_DIM, MAX_SEQLEN, Causal, Layout, Operand, Problem, Window, WindowSize

LAYOUTS = ("bhsd", "bshd")
CAUSAL: tuple[Any, ...] = (False, True, "bottom-right", "top-left")
KERNELS = ("auto", "sm90", "sm80", "wmma", "fa1", "naive")
OVERLAP_WORK = 100_000  # steps that NumPy may take to find an overlap: microseconds to a few milliseconds

AXES = {"bhsd": "(..., heads, sequence, head_dim)", "bshd": "(..., sequence, heads, head_dim)"}


def dtype_of(arrays: dict[str, Any], allowed: tuple[str, ...]) -> str:
    """The name of the dtype that all arrays share."""
    (first, array), *others = arrays.items()
    name = str(array.dtype)
    if name not in allowed:
        raise TypeError(f"{first}: dtype {name} is not supported here; allowed are {', '.join(allowed)}")
    for other, other_array in others:
        if str(other_array.dtype) != name:
            raise TypeError(f"{other}: dtype {other_array.dtype} differs from {first}'s {name}; all must agree")
    return name


def layout(value: Any) -> Layout:
    if not isinstance(value, str) or value not in LAYOUTS:
        raise ValueError(f"layout: got {value!r}; allowed are 'bhsd' and 'bshd'")
    checked: Any = value
    return checked


def causal(value: Any) -> Causal:
    if isinstance(value, np.bool_):
        value = bool(value)
    if not isinstance(value, (bool, str)) or value not in CAUSAL:
        raise ValueError(f"causal: got {value!r}; allowed are False, True (= 'bottom-right') and 'top-left'")
    checked: Any = value
    return checked


def window_size(value: Any) -> WindowSize:
    if value is None:
        return None
    valid = isinstance(value, (tuple, list)) and len(value) == 2
    if not valid or not all(side is None or is_size(side) for side in value):
        raise ValueError(
            f"window_size: got {value!r}; allowed are None and (left, right), each a number of keys >= 0 "
            "or None for no limit"
        )
    left, right = value
    return None if left is None else int(left), None if right is None else int(right)


def is_size(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)


def shape(value: Any, length: int) -> Any:  # a tuple of so many ints
    """The sizes of the last axes of the pairs of queries and keys, `length` of them."""
    if not isinstance(value, (tuple, list)) or len(value) != length or not all(map(is_size, value)):
        axes = ", ".join(("batch", "heads", "queries", "keys")[-length:])
        raise ValueError(f"shape: got {value!r}; it must be {length} sizes >= 0: ({axes})")
    return tuple(map(int, value))


def is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def comparable(value: Any) -> Any:
    """A real number to hold against limits: beside a short float of NumPy's, they would be rounded to its dtype."""
    return float(value) if isinstance(value, np.floating) else value


def scale(name: str, value: Any, head_dim: int, dtype: str) -> float:
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    if not is_real(value):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}; allowed are None and a real number")
    limit = float(np.finfo(lse_dtype(dtype)).max)
    if not abs(comparable(value)) <= limit:
        raise ValueError(f"{name}: got {value!r}; it must be finite and its absolute value at most {limit:.4g}")
    return float(value)


def flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}; allowed are True and False")


def kernel(value: Any, available: tuple[str, ...], kind: str) -> None:
    if not isinstance(value, str) or value not in KERNELS:
        raise ValueError(f"kernel: got {value!r}; allowed are {', '.join(map(repr, KERNELS))}")
    if value not in available:
        raise NotImplementedError(
            f"kernel={value!r} does not compute {kind} arrays; it runs on CuPy arrays. "
            f"Allowed here: {', '.join(map(repr, available))}"
        )


def operand(name: str, array: Any, layout: Layout) -> Operand:
    """The array as (batch, heads, rows, columns)."""
    shape = array.shape
    if not 2 <= len(shape) <= 4:
        raise ValueError(
            f"{name}: shape {shape} has {len(shape)} axes; allowed are 2 (sequence, head_dim), 3 and 4: {AXES[layout]}"
        )
    return Operand.of(shape, element_strides(name, array), layout, str(array.dtype), array.aligned)


def packed(arrays: dict[str, Any]) -> None:
    """Refuse arrays that are not (total, heads, head_dim)."""
    for name, array in arrays.items():
        if len(array.shape) != 3:
            raise ValueError(
                f"{name}: shape {array.shape} has {len(array.shape)} axes; "
                "packed arrays have 3: (total, heads, head_dim)"
            )


def element_strides(name: str, array: Any) -> tuple[int, ...]:
    """The strides of an array in elements."""
    itemsize = array.dtype.itemsize
    if any(size > 1 and stride % itemsize for size, stride in zip(array.shape, array.strides, strict=True)):
        raise ValueError(
            f"{name}: strides {array.strides} are no multiples of its elements' {itemsize} bytes; "
            "copy it first, for example with numpy.ascontiguousarray(x)"
        )
    return tuple(stride // itemsize for stride in array.strides)


def batch_of(operands: dict[str, Operand]) -> int:
    """The batch size that the operands broadcast to."""
    sizes = {name: op.shape[0] for name, op in operands.items()}
    distinct = {size for size in sizes.values() if size != 1}
    if len(distinct) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"batch sizes do not broadcast ({listed}); they must be equal or 1")
    return distinct.pop() if distinct else 1


def problem(
    dtype: str,
    q: Operand,
    k: Operand,
    v: Operand,
    scale_value: Any,
    causal_value: Any,
    window_value: Any,
) -> Problem:
    """The problem that q, k, v and the options pose, or the error that says why they do not fit together."""
    batch = batch_of({"q": q, "k": k, "v": v})
    _, num_heads, seqlen_q, head_dim = q.shape
    _, num_heads_kv, seqlen_k, head_dim_k = k.shape
    head_dim_v = v.shape[3]
    for name, size in (("q", head_dim), ("v", head_dim_v)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: head_dim is {size}; allowed are 1 to {MAX_HEAD_DIM}")
    if head_dim_k != head_dim:
        raise ValueError(f"k: head_dim is {head_dim_k}, but q's is {head_dim}; they must be equal")
    if v.shape[1] != num_heads_kv:
        raise ValueError(f"v: has {v.shape[1]} heads, but k has {num_heads_kv}; they must be equal")
    if v.shape[2] != seqlen_k:
        raise ValueError(f"v: sequence length is {v.shape[2]}, but k's is {seqlen_k}; they must be equal")
    if num_heads_kv < 1 or num_heads < 1 or num_heads % num_heads_kv:
        raise ValueError(f"q: has {num_heads} heads; it must be a positive multiple of k's {num_heads_kv}")
    for name, length in (("q", seqlen_q), ("k", seqlen_k)):
        if length > MAX_SEQLEN:
            raise ValueError(f"{name}: sequence length is {length}; at most {MAX_SEQLEN} is allowed")
    return Problem(
        dtype=dtype,
        batch=batch,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        softmax_scale=scale("scale", scale_value, head_dim, dtype),
        window=Window.of(causal(causal_value), window_size(window_value)),
    )


def out_shape(problem: Problem, layout: Layout, ndim: int) -> tuple[int, ...]:
    """The shape of the result, with as many axes as the largest input."""
    sizes = {
        "bhsd": (problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v),
        "bshd": (problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim_v),
    }[layout]
    if ndim == 2:
        return problem.seqlen_q, problem.head_dim_v
    return sizes[4 - ndim :]


def lse_shape(problem: Problem, ndim: int) -> tuple[int, ...]:
    """The shape of lse: (..., heads, sequence) in every layout."""
    return (problem.batch, problem.num_heads, problem.seqlen_q)[4 - ndim :]


def same_shape(name: str, array: Any, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name}: shape is {array.shape}; it must be {expected}")


def lse_dtype(dtype: str) -> np.dtype[Any]:
    return np.dtype("float64" if dtype == "float64" else "float32")


def no_self_overlap(name: str, array: Any) -> None:
    """Refuse an array to be written in which two indices may be one place in memory."""
    if 0 in array.shape:
        return
    reach = array.dtype.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise ValueError(
                    f"{name}: strides {array.strides} of shape {array.shape} may put several elements in one place; "
                    "an array that is written must have a place for each"
                )
            reach += stride * (size - 1)


class _Memory:
    """The memory of an array as NumPy's array interface describes it; nothing is ever read through it."""

    def __init__(self, array: Any, pointer: int) -> None:
        self.__array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (pointer, False),
            "version": 3,
        }


def _overlap(a: Any, a_pointer: int, b: Any, b_pointer: int) -> bool:
    """Whether two arrays have memory in common; interleaved ones, such as packed q, k and v, have not."""
    if a.size == 0 or b.size == 0:
        return False
    try:
        views = np.asarray(_Memory(a, a_pointer)), np.asarray(_Memory(b, b_pointer))
        return np.shares_memory(*views, max_work=OVERLAP_WORK)  # type: ignore[arg-type]  # any number of steps
    except np.exceptions.TooHardError:
        return True


def writable(name: str, array: Any, backend: Any, **inputs: Any) -> None:
    """Refuse an array that cannot be written, or shares memory with an input."""
    if getattr(getattr(array, "flags", None), "writeable", True) is False:
        raise ValueError(f"{name}: is read-only; it must be writeable")
    for other, other_array in inputs.items():
        if _overlap(array, backend.pointer(array), other_array, backend.pointer(other_array)):
            raise ValueError(f"{name}: overlaps {other} in memory; it must not overlap an input")
