"""Which backend computes a call: NumPy arrays on the CPU, CuPy arrays with kernels on their GPU."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from . import _numpy
from ._problem import Operand, Problem


class Backend(Protocol):
    """Computes attention on one kind of arrays."""

    kind: str
    dtypes: tuple[str, ...]
    kernels: tuple[str, ...]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate an uninitialised array."""

    def pointer(self, array: Any) -> int:
        """The address of an array's first element."""

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """Prepare calls with operands of these shapes and strides: a function of (q, k, v, out, lse or None)."""

    def plan_backward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """Likewise, a function of (dout, q, k, v, out, lse, dq, dk, dv)."""


class NumpyBackend:
    """Computes attention with NumPy on the CPU."""

    kind = "NumPy"
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    kernels: tuple[str, ...] = ("auto",)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def pointer(self, array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        q_op, k_op, v_op, out_op, lse_op = (operands[name] for name in ("q", "k", "v", "out", "lse"))

        def forward(q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
            lse_view = None if lse is None else _view(lse, lse_op)[..., 0]
            _numpy.forward(problem, _view(q, q_op), _view(k, k_op), _view(v, v_op), _view(out, out_op), lse_view)

        return forward

    def plan_backward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        names = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")

        def backward(*arrays: Any) -> None:
            views = {name: _view(array, operands[name]) for name, array in zip(names, arrays, strict=True)}
            views["lse"] = views["lse"][..., 0]
            _numpy.backward(problem, **views)

        return backward


def _view(array: Any, operand: Operand) -> Any:
    """The array as (batch, heads, rows, columns)."""
    strides = tuple(stride * array.itemsize for stride in operand.strides)
    return np.lib.stride_tricks.as_strided(array, operand.shape, strides)


numpy_backend: Backend = NumpyBackend()
"""What computes calls on NumPy arrays. The tests put an emulated GPU here."""


NAMES = ("q", "k", "v", "out", "dout", "lse")

_cupy: Any = None
"""The module of that name, once a CuPy array has been seen."""


def backend_of(*arrays: Any) -> Backend:
    """The backend of arrays (named as in NAMES) that are all of one kind and, for CuPy, on the current device."""
    kind = type(arrays[0])
    for array in arrays:
        if type(array) is not kind:
            return _backend_of_kinds(arrays)
    if kind is np.ndarray:
        return numpy_backend
    if _cupy is None or kind is not _cupy.ndarray:
        return _backend_of_kinds(arrays)
    device_id: int = _cupy.current_device_id()
    for name, array in zip(NAMES, arrays, strict=False):
        if array.data.device_id != device_id:
            raise ValueError(
                f"{name}: is on device {array.data.device_id}, but the current device is {device_id}; "
                f"all arrays must be there (with cupy.cuda.Device({array.data.device_id}): ...)"
            )
        if array.data.ptr % array.dtype.itemsize:
            raise ValueError(
                f"{name}: its address {array.data.ptr:#x} is no multiple of the {array.dtype.itemsize} bytes "
                "of an element; copy it first, for example with x.copy()"
            )
    backend: Backend = _cupy.backend_on(device_id)
    return backend


def _backend_of_kinds(arrays: tuple[Any, ...]) -> Backend:
    """The same for subclasses of NumPy's arrays, the first CuPy array, and everything that is refused."""
    global _cupy
    kinds = []
    for name, array in zip(NAMES, arrays, strict=False):
        if isinstance(array, np.ndarray) and not isinstance(array, (np.matrix, np.ma.MaskedArray)):
            kinds.append("numpy")
        elif f"{type(array).__module__}.{type(array).__name__}" == "cupy.ndarray":
            kinds.append("cupy")
        else:
            raise TypeError(_foreign(name, array))
    for name, kind in zip(NAMES, kinds, strict=False):
        if kind != kinds[0]:
            raise TypeError(
                f"{name}: is a {kind}.ndarray, but {NAMES[0]} is a {kinds[0]}.ndarray; all arrays must be of one "
                "kind. Convert with cupy.asarray(x) or cupy.asnumpy(x)"
            )
    if kinds[0] == "numpy":
        return numpy_backend
    if _cupy is None:
        from . import _cupy as module

        _cupy = module
    return backend_of(*arrays)


def _foreign(name: str, array: Any) -> str:
    kind = type(array)
    hint = "numpy.asarray(x)"
    if isinstance(array, np.ndarray):
        hint = "numpy.asarray(x), or x.filled() where a mask means something"
    elif hasattr(array, "__dlpack__") or hasattr(array, "__cuda_array_interface__"):
        hint = "cupy.from_dlpack(x), or numpy.from_dlpack(x) for one in host memory"
    return (
        f"{name}: got a {kind.__module__}.{kind.__qualname__}; allowed are cupy.ndarray and numpy.ndarray. "
        f"Convert with {hint}"
    )
