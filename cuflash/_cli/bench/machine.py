"""What a benchmark asks of the machine it runs on: a GPU through CuPy, or the CPU through NumPy."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import numpy as np

from cuflash._cli.bench.cells import Cell, Op
from cuflash._cli.bench.timing import Call

Array = Any


class Machine(Protocol):
    """One device, its array library, and how time and memory are measured on it."""

    @property
    def kind(self) -> str:
        """Either "gpu" or "cpu"."""

    @property
    def xp(self) -> ModuleType:
        """The array library: CuPy or NumPy."""

    @property
    def default_dtype(self) -> str:
        """What is measured if the user does not say."""

    def head(self) -> dict[str, Any]:
        """What the head of a results file says about the machine."""

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Array:
        """Normally distributed numbers: zeros would draw less power and run faster than real data."""

    def matmul(
        self,
        a: Array,
        b: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        dtype: Any = None,
    ) -> Array:
        """The product of two stacks of matrices, by BLAS; in float32 unless another dtype is asked for."""

    def kernels(self, op: Op, cell: Cell) -> list[str]:
        """What is measured if the user does not say: the kernels that ``"auto"`` chooses from and that can run here."""

    def kernel_name(self, op: Op, cell: Cell, kernel: str) -> str:
        """The kernel family that computes a cell when ``kernel`` is asked for."""

    def sample(self, call: Call, repeats: int) -> list[float]:
        """Milliseconds of each of ``repeats`` calls, with cold caches."""

    def sample_host(self, call: Call, repeats: int) -> list[float]:
        """Milliseconds on the host of a call, ``repeats`` times; what runs on the device does not count."""

    def peak_bytes(self, call: Call) -> int:
        """The most memory that a call holds beyond what it was given and what it returns."""

    def release(self) -> None:
        """Give unused memory back, so that the next contender can have it."""


def dtype_named(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name, also of "bfloat16", which the package ml_dtypes brings.

    Raises
    ------
    SystemExit
        If that is not installed; nothing can be measured then.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise SystemExit(
            "python -m cuflash: error: bfloat16 needs the package ml_dtypes. Try: pip install ml_dtypes, or measure "
            f"another dtype: --dtype float16 ({error})"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)
