"""Checking programmable scores and masks, and the arguments of their expressions."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal

import numpy as np

from . import _checks
from ._problem import Mod

ModKind = Literal["callable", "expression"]
"""How a backend takes score_mod and mask_mod: Python callables, or CUDA C++ expressions."""

NAMES = ("score", "b", "h", "q_idx", "kv_idx")
ARG_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
TAKEN = (*NAMES, "enter", "score_mod", "mask_mod", "cuflash", "NULL", "INFINITY")  # where expressions are compiled
MAX_ARG_NDIM = 4
INT_LIMIT = 2**31  # an int of an expression has 32 bits, as q_idx and kv_idx have

# fmt: off
CPP_KEYWORDS = frozenset((
    "alignas", "alignof", "and", "and_eq", "asm", "auto", "bitand", "bitor", "bool", "break", "case", "catch", "char",
    "char16_t", "char32_t", "char8_t", "class", "co_await", "co_return", "co_yield", "compl", "concept", "const",
    "const_cast", "consteval", "constexpr", "constinit", "continue", "decltype", "default", "delete", "do", "double",
    "dynamic_cast", "else", "enum", "explicit", "export", "extern", "false", "float", "for", "friend", "goto", "if",
    "inline", "int", "long", "mutable", "namespace", "new", "noexcept", "not", "not_eq", "nullptr", "operator", "or",
    "or_eq", "private", "protected", "public", "register", "reinterpret_cast", "requires", "return", "short", "signed",
    "sizeof", "static", "static_assert", "static_cast", "struct", "switch", "template", "this", "thread_local", "throw",
    "true", "try", "typedef", "typeid", "typename", "union", "unsigned", "using", "virtual", "void", "volatile",
    "wchar_t", "while", "xor", "xor_eq",
))
# fmt: on


def mod(mod_kind: ModKind, score_mod: Any, mask_mod: Any, mod_args: dict[str, Any]) -> Mod | None:
    """What the three options say together; `mod_args` as :func:`arguments` returned them."""
    given = {name: value for name, value in (("score_mod", score_mod), ("mask_mod", mask_mod)) if value is not None}
    for name, value in given.items():
        got = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
        if mod_kind == "callable" and not callable(value):
            raise TypeError(
                f"{name}: got {got}; allowed for NumPy arrays is a Python callable f({', '.join(NAMES)}); CUDA C++ "
                "expressions are for CuPy arrays"
            )
        if mod_kind == "callable" and not _takes_names(value):
            raise TypeError(f"{name}: got {value!r}; it must take {len(NAMES)} arguments, f({', '.join(NAMES)})")
        if mod_kind == "expression" and not isinstance(value, str):
            raise TypeError(
                f"{name}: got {got}; allowed for CuPy arrays is a str, a CUDA C++ expression in {', '.join(NAMES)} and "
                "the names of mod_args; callables are for NumPy arrays"
            )
        if mod_kind == "expression" and not value.strip():
            raise ValueError(f"{name}: got {got}; it must be a CUDA C++ expression")
    if mod_args and mod_kind == "callable":
        raise ValueError(
            f"mod_args: got {', '.join(map(repr, mod_args))}; they are for CUDA C++ expressions on CuPy arrays; on "
            "NumPy arrays score_mod and mask_mod are Python callables, which know their arrays themselves"
        )
    for name in mod_args:
        if not any(re.search(rf"\b{name}\b", expression) for expression in given.values()):
            raise ValueError(f"mod_args: {name!r} is used by neither score_mod nor mask_mod")
    if not given:
        return None
    return Mod(score_mod, mask_mod, tuple((name, _kind(value)) for name, value in mod_args.items()))


def _takes_names(function: Any) -> bool:
    try:
        inspect.signature(function).bind(*NAMES)
    except TypeError:
        return False
    except ValueError:  # a built-in function that does not tell
        return True
    return True


def arguments(mod_args: Any) -> dict[str, Any]:
    """The arguments in the order of their names: arrays as they are, and Python's int, float and bool."""
    if mod_args is None:
        return {}
    if not isinstance(mod_args, dict):
        raise TypeError(f"mod_args: got {mod_args!r}; allowed are None and a dict of arrays and numbers by name")
    for name in mod_args:
        if not isinstance(name, str) or not re.fullmatch("(?!.*__)[A-Za-z][A-Za-z0-9_]*", name):
            raise ValueError(
                f"mod_args: {name!r} is no name for a variable; allowed are ASCII letters, digits and _, "
                "a letter first and no __"
            )
        if name in TAKEN or name in CPP_KEYWORDS:
            raise ValueError(f"mod_args: the name {name!r} is taken; {', '.join(TAKEN)} and C++'s keywords are")
    return {name: _argument(name, mod_args[name]) for name in sorted(mod_args)}


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating))


def read_only(*indices: Any) -> tuple[Any, ...]:
    """The same indices for a callable that must not write to them: it is called more than once with these arrays."""
    for array in indices:
        array.flags.writeable = False
    return indices


def returned(name: str, array: Any) -> None:
    """Refuse what a callable returned if it is not of real numbers, or from a mask_mod of bool or int."""
    kinds, allowed = {"score_mod": ("biuf", "real numbers"), "mask_mod": ("biu", "bool and int")}[name]
    if array.dtype.kind not in kinds and (name == "mask_mod" or str(array.dtype) != "bfloat16"):
        hint = "; is there a return statement?" if array.dtype == object else ""  # None, most likely
        raise TypeError(f"{name}: returned dtype {array.dtype}; allowed are {allowed}{hint}")


def _argument(name: str, value: Any) -> Any:
    if is_number(value):
        value = _plain_number(value)
    if isinstance(value, float) and np.isfinite(value) and abs(value) > np.finfo(np.float32).max:
        raise ValueError(f"mod_args[{name!r}]: got {value}; a float must be within the range of float32")
    if isinstance(value, int) and not -INT_LIMIT <= value < INT_LIMIT:
        raise ValueError(f"mod_args[{name!r}]: got {value}; an int must have at most 32 bits")
    if is_number(value) or not hasattr(value, "dtype"):  # what is no array, backend_of refuses
        return value
    if str(value.dtype) not in ARG_DTYPES:
        raise TypeError(
            f"mod_args[{name!r}]: dtype {value.dtype} is not supported; allowed are {', '.join(ARG_DTYPES)}"
        )
    if not 1 <= value.ndim <= MAX_ARG_NDIM:
        raise ValueError(f"mod_args[{name!r}]: has {value.ndim} axes; allowed are 1 to {MAX_ARG_NDIM}")
    _checks.element_strides(f"mod_args[{name!r}]", value)
    return value


def _plain_number(value: Any) -> bool | int | float:
    """A number of NumPy's, or of a subclass, as Python's own."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


def _kind(value: Any) -> str | tuple[str, int]:
    """The type of an argument as Mod tells it."""
    return type(value).__name__ if is_number(value) else (str(value.dtype), value.ndim)
