"""Which backend computes a call: NumPy arrays on the CPU, CuPy arrays with kernels on their GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from . import _check_options, _numpy
from ._check_mods import ModKind
from ._problem import Operand, Problem


class Backend(Protocol):
    """Computes attention on one kind of arrays."""

    kind: str
    dtypes: tuple[str, ...]
    kernels: tuple[str, ...]
    mod_kind: ModKind

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate an uninitialised array."""

    def temporaries(self) -> AbstractContextManager[None]:
        """Where arrays are allocated that do not outlive a call."""

    def pointer(self, array: Any) -> int:
        """The address of an array's first element."""

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """Prepare calls with operands of these shapes and strides: a function of (q, k, v, out, lse or None, **extras).

        The extras are what the variant of a call takes, by the names of the options: arrays, a seed that may be an
        int, a BlockMask, the dict mod_args.
        """

    def plan_backward(
        self, problem: Problem, kernel_name: str, operands: dict[str, Operand], *, deterministic: bool = False
    ) -> Any:
        """Likewise, a function of (dout, q, k, v, out, lse, dq, dk, dv, **extras); dbias and dsinks are written too."""


class NumpyBackend:
    """Computes attention with NumPy on the CPU."""

    kind = "NumPy"
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    kernels: tuple[str, ...] = ("auto",)
    mod_kind: ModKind = "callable"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pointer(self, array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        def forward(q: Any, k: Any, v: Any, out: Any, lse: Any, **extras: Any) -> None:
            arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, **extras}
            _numpy.forward(problem, **_views(problem, operands, arrays))

        return forward

    def plan_backward(
        self, problem: Problem, kernel_name: str, operands: dict[str, Operand], *, deterministic: bool = False
    ) -> Any:
        names = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")

        def backward(*arrays: Any, **extras: Any) -> None:
            named = dict(zip(names, arrays, strict=True)) | extras
            _numpy.backward(problem, **_views(problem, operands, named))

        return backward


ROWS = ("lse", "dlse")
LISTS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
AS_THEY_ARE = ("block_mask", "dsinks")


def _views(problem: Problem, operands: dict[str, Operand], arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a call as NumPy's loops take them: most as (batch, heads, rows, columns)."""

    def view(name: str, array: Any) -> Any:
        if array is None or name in AS_THEY_ARE:
            return array
        if name == "seed":
            return int(array) if isinstance(array, int) else int(array.item())
        if name in LISTS:
            return array.astype(np.int64)
        viewed = _view(array, operands[name])
        return viewed[..., 0] if name in ROWS else viewed

    views = {name: view(name, array) for name, array in arrays.items()}
    if problem.packed:
        lists = {name: views[name] for name in LISTS if name in views}
        _check_options.offset_values(problem.seqlen_q, problem.seqlen_k, **lists)
    return views


def _view(array: Any, operand: Operand) -> Any:
    """The array as (batch, heads, rows, columns)."""
    strides = tuple(stride * array.itemsize for stride in operand.strides)
    return np.lib.stride_tricks.as_strided(array, operand.shape, strides)


numpy_backend: Backend = NumpyBackend()
"""What computes calls on NumPy arrays. The tests put an emulated GPU here."""


NAMES = ("q", "k", "v", "out", "dout", "lse")
"""What errors call the arrays of a plain call."""

_cupy: Any = None
"""The module of that name, once a CuPy array has been seen."""


def backend_of(*arrays: Any, names: tuple[str, ...] = NAMES) -> Backend:
    """The backend of arrays, of these names, that are all of one kind and, for CuPy, on the current device."""
    kind = type(arrays[0])
    for array in arrays:
        if type(array) is not kind:
            return _backend_of_kinds(arrays, names)
    if kind is np.ndarray:
        return numpy_backend
    if _cupy is None or kind is not _cupy.ndarray:
        return _backend_of_kinds(arrays, names)
    device_id: int = _cupy.current_device_id()
    for name, array in zip(names, arrays, strict=False):
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


def _backend_of_kinds(arrays: tuple[Any, ...], names: tuple[str, ...]) -> Backend:
    """The same for subclasses of NumPy's arrays, the first CuPy array, and everything that is refused."""
    global _cupy
    kinds = []
    for name, array in zip(names, arrays, strict=False):
        if isinstance(array, np.ndarray) and not isinstance(array, (np.matrix, np.ma.MaskedArray)):
            kinds.append("numpy")
        elif f"{type(array).__module__}.{type(array).__name__}" == "cupy.ndarray":
            kinds.append("cupy")
        else:
            raise TypeError(_foreign(name, array))
    for name, kind in zip(names, kinds, strict=False):
        if kind != kinds[0]:
            raise TypeError(
                f"{name}: is a {kind}.ndarray, but {names[0]} is a {kinds[0]}.ndarray; all arrays must be of one "
                "kind. Convert with cupy.asarray(x) or cupy.asnumpy(x)"
            )
    if kinds[0] == "numpy":
        return numpy_backend
    if _cupy is None:
        from . import _cupy as module

        _cupy = module
    return backend_of(*arrays, names=names)


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
