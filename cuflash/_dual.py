"""Dual numbers of NumPy arrays: a value and its derivative, carried through the same expression (Clifford 1873)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

Array = NDArray[Any]

# By the name of a function: its derivatives by each argument, out of the result, then the arguments.
DERIVATIVES: dict[str, tuple[Callable[..., Any], ...]] = {
    "add": (lambda y, a, b: 1.0, lambda y, a, b: 1.0),
    "subtract": (lambda y, a, b: 1.0, lambda y, a, b: -1.0),
    "multiply": (lambda y, a, b: b, lambda y, a, b: a),
    "divide": (lambda y, a, b: 1 / b, lambda y, a, b: -y / b),
    "power": (lambda y, a, b: b * a ** _one_less(b), lambda y, a, b: y * _log_of_base(a, b, y.dtype)),
    "negative": (lambda y, x: -1.0,),
    "positive": (lambda y, x: 1.0,),
    "square": (lambda y, x: 2 * x,),
    "reciprocal": (lambda y, x: -y * y,),
    "sqrt": (lambda y, x: 0.5 / y,),
    "exp": (lambda y, x: y,),
    "exp2": (lambda y, x: math.log(2) * y,),
    "expm1": (lambda y, x: y + 1,),
    "log": (lambda y, x: 1 / x,),
    "log2": (lambda y, x: 1 / (math.log(2) * x),),
    "log1p": (lambda y, x: 1 / (1 + x),),
    "sin": (lambda y, x: np.cos(x),),
    "cos": (lambda y, x: -np.sin(x),),
    "arctan": (lambda y, x: 1 / (1 + x * x),),
    "tanh": (lambda y, x: 1 - y * y,),
}
# What chooses between its arguments takes the value and the derivative from the same one, as kernels do.
CHOICES: dict[str, Callable[..., Any]] = {
    "absolute": lambda x: _absolute(x),
    "fabs": lambda x: _absolute(x),
    "maximum": lambda x, y: where(x < y, y, x),
    "minimum": lambda x, y: where(y < x, y, x),
    "fmax": lambda x, y: where((x < y) | np.isnan(x), y, x),
    "fmin": lambda x, y: where((y < x) | np.isnan(x), y, x),
    "clip": lambda x, a_min=None, a_max=None, **limits: _clip(x, limits.get("min", a_min), limits.get("max", a_max)),
    "where": lambda condition, x, y: where(condition, x, y),
}
TESTS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "isfinite", "isinf", "isnan")
STEPS = ("floor", "ceil", "trunc", "rint", "sign")  # constant between their steps
KEYWORDS = {"clip": {"a_min", "a_max", "min", "max"}}  # of functions that take any


class Dual(NDArrayOperatorsMixin):
    """Values, and their derivatives by one variable; operators and NumPy's functions act on both.

    Parameters
    ----------
    value : array
    slope : array or float
        What broadcasts to the value's shape. The default is that of the variable itself.

    Examples
    --------
    >>> import numpy as np
    >>> x = Dual(np.array([0.0, 1.0, 3.0]))
    >>> np.where(x < 2, x * x, 4 * x - 4).slope.tolist()
    [0.0, 2.0, 4.0]
    """

    def __init__(self, value: Any, slope: Any = 1.0) -> None:
        self.value = value
        self.slope = slope

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    @property
    def ndim(self) -> int:
        return np.ndim(self.value)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.asarray(self.value).dtype

    def astype(self, dtype: Any) -> Dual:
        return Dual(np.asarray(self.value, dtype), np.asarray(self.slope, dtype))

    def reshape(self, shape: tuple[int, ...]) -> Dual:
        one_slope = np.ndim(self.slope) == 0
        slope = self.slope if one_slope else np.broadcast_to(self.slope, self.shape).reshape(shape)
        return Dual(self.value.reshape(shape), slope)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        (out,) = options.pop("out", (None,))
        if method != "__call__" or options:
            raise TypeError(f"numpy.{ufunc.__name__}: a score_mod can only call it, and without {list(options)}")
        result = _apply(ufunc.__name__, ufunc, inputs)
        if out is None:
            return result
        if not isinstance(out, Dual):
            raise TypeError(f"numpy.{ufunc.__name__}: out must be a score where an argument is one")
        out.value, out.slope = result.value, result.slope
        return out

    def __array_function__(self, function: Any, types: Any, args: Any, options: dict[str, Any]) -> Any:
        if function.__name__ in ("zeros_like", "ones_like", "full_like"):
            return function(_value(args[0]), *args[1:], **options)
        return _apply(function.__name__, function, args, **options)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"score.{name}: a score_mod can use operators and functions of numpy: {_known()}")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"score: a score_mod cannot make another array of it, only use functions of numpy: {_known()}")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(f"score[{index!r}]: a score_mod sees the scores of a tile as a whole; numpy.where chooses")

    def __repr__(self) -> str:
        return f"Dual({self.value!r}, {self.slope!r})"


def needs_derivative(score_mod: Callable[..., Any]) -> Callable[..., Any]:
    """The same score_mod for a forward pass, but its first call raises what the backward would if it has no derivative.

    Kernels raise in the forward pass too: they are compiled with dual numbers.
    """
    unknown = True

    @wraps(score_mod)
    def checked(score: Any, *place: Any) -> Any:
        nonlocal unknown
        if unknown:
            unknown = False
            score_mod(Dual(score), *place)
        return score_mod(score, *place)

    return checked


def _known() -> str:
    return ", ".join(sorted((*DERIVATIVES, *CHOICES, *TESTS, *STEPS)))


def where(condition: Any, x: Any, y: Any) -> Dual:
    """The dual number of `x` where the condition holds, else that of `y`."""
    condition = _value(condition)
    return Dual(np.where(condition, _value(x), _value(y)), np.where(condition, _slope(x), _slope(y)))


def _apply(name: str, function: Callable[..., Any], inputs: Any, **options: Any) -> Any:
    unknown = options.keys() - KEYWORDS.get(name, set())
    if unknown:
        raise TypeError(f"numpy.{name}: a score_mod can only call it without {', '.join(sorted(unknown))}")
    if name in CHOICES:
        return CHOICES[name](*inputs, **options)
    values = [_value(x) for x in inputs]
    if name in TESTS:
        return function(*values)
    if name in STEPS:
        return Dual(function(*values), 0.0)
    if name not in DERIVATIVES:
        raise TypeError(f"numpy.{name}: has no derivative here; a score_mod can use {_known()}")
    result = function(*values)
    terms = (
        derivative(result, *values) * x.slope
        for derivative, x in zip(DERIVATIVES[name], inputs, strict=True)
        if isinstance(x, Dual)
    )
    return Dual(result, sum(terms))


def _one_less(exponent: Any) -> Any:
    """The exponent in the derivative of a power, but 0 for 0: nothing infinite meets that factor 0."""
    return (exponent - 1) * (exponent != 0)


def _log_of_base(base: Any, exponent: Any, dtype: np.dtype[Any]) -> Any:
    """The log of a base, but 0 for 0: its powers are constant."""
    return np.log(np.where((base == 0) & (exponent >= 0), 1, base), dtype=dtype)


def _absolute(x: Any) -> Any:
    return where(x < 0, -x, x)


def _clip(x: Any, a_min: Any, a_max: Any) -> Any:
    if a_min is not None:
        x = np.maximum(x, a_min)
    return x if a_max is None else np.minimum(x, a_max)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def _slope(x: Any) -> Any:
    return x.slope if isinstance(x, Dual) else 0.0
