"""Running problems on kernels: choose a family, fill the parameters, launch."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _wmma
from ._device import Array, Device, Launch
from ._kernel import Kernel
from ._params import fill
from ._problem import Operand, Problem

FAMILIES = {"wmma": _wmma}


class _Step(NamedTuple):
    """A kernel, ready to be launched on arrays; None where there is nothing to compute."""

    launch: Launch | None
    num_blocks: int
    params: Any

    def __call__(self, *arrays: Any) -> None:
        if self.launch is not None:
            self.launch(self.num_blocks, (*arrays, self.params))


class LaunchBackend:
    """Computes attention with kernels on a device.

    Parameters
    ----------
    device : Device
        Where the kernels run.
    tf32 : bool
        Whether float32 is multiplied with single TF32 products.
    """

    kind = "CuPy"
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    kernels: tuple[str, ...] = ("auto", *FAMILIES)

    def __init__(self, device: Device, *, tf32: bool = False) -> None:
        self.device = device
        self._tf32 = tf32

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.device.empty(shape, dtype)

    def pointer(self, array: Array) -> int:
        return self.device.pointer(array)

    def _number(self, problem: Problem) -> str:
        return "tfloat32" if problem.dtype == "float32" and self._tf32 else problem.dtype

    def family_name(self, problem: Problem, kernel: str) -> str:
        """The family that `kernel` names; for "auto" the first, and so the fastest, that can do it."""
        reasons = {}
        for name in FAMILIES if kernel == "auto" else (kernel,):
            reason = FAMILIES[name].why_not(problem, self._number(problem), self.device.chip)
            if reason is None:
                return name
            reasons[name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"kernel={kernel!r} cannot compute this call: {listed}")

    def _step(self, kernel: Kernel, num_blocks: int, problem: Problem, operands: dict[str, Operand]) -> _Step:
        if max(problem.batch, problem.num_heads) >= 2**31:
            raise NotImplementedError(f"batch {problem.batch}, heads {problem.num_heads}: kernels count to {2**31 - 1}")
        if num_blocks >= 2**31:
            raise NotImplementedError(f"the call needs {num_blocks} blocks of threads; a GPU takes {2**31 - 1}")
        launch = self.device.load(kernel.source) if num_blocks else None
        return _Step(launch, num_blocks, self.device.struct(fill(kernel.params, problem, operands)))

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """A function of (q, k, v, out, lse or None) that computes out and lse."""
        family = FAMILIES[self.family_name(problem, kernel_name)]
        kernel, num_blocks = family.forward(problem, self._number(problem), self.device.chip)
        step = self._step(kernel, num_blocks, problem, operands)

        def forward(q: Array, k: Array, v: Array, out: Array, lse: Array | None) -> None:
            step(q, k, v, out, self.device.null if lse is None else lse)

        return forward

    def plan_backward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """A function of (dout, q, k, v, out, lse, dq, dk, dv) that computes the last three."""
        family, number, chip = FAMILIES[self.family_name(problem, kernel_name)], self._number(problem), self.device.chip
        makers = (family.delta, family.backward_dkdv, family.backward_dq)
        kernels = [make(problem, number, chip) for make in makers]
        delta_step, dkdv_step, dq_step = (
            self._step(kernel, num_blocks, problem, operands) for kernel, num_blocks in kernels
        )
        delta_shape = (problem.batch, problem.num_heads, problem.seqlen_q)

        def backward(
            dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, dq: Array, dk: Array, dv: Array
        ) -> None:
            delta = self.device.empty(delta_shape, "float32")
            delta_step(out, dout, delta)
            dkdv_step(q, k, v, dout, lse, delta, dk, dv)
            dq_step(q, k, v, dout, lse, delta, dq)

        return backward
