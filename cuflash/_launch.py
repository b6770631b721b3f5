"""Running problems on kernels: which family computes a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from . import _fa1, _naive, _sm80, _sm90, _wmma
from ._call import Call, Run
from ._device import Array, Chip, Device
from ._heads_as_rows import heads_as_rows
from ._kernel import find_blocks
from ._options import Options
from ._problem import BLOCK_SIZE, Mod, Operand, Problem, ceil_div


class Family(Protocol):
    """A module with kernels that compute attention in one way."""

    def why_not(
        self, problem: Problem, number: str, chip: Chip, options: Options = ..., operands: Mapping[str, Operand] = ...
    ) -> str | None:
        """The reason why it cannot compute a problem on a GPU, or None if it can."""

    def why_no_backward(self, problem: Problem, chip: Chip, options: Options = ...) -> str | None:
        """The reason why it cannot compute the gradients of a problem that it can compute, or None if it can."""

    def plan_forward(self, call: Call) -> Run:
        """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""

    def plan_backward(self, call: Call) -> Run:
        """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""


FAMILIES: dict[str, Family] = {"sm90": _sm90, "sm80": _sm80, "wmma": _wmma, "fa1": _fa1, "naive": _naive}
AUTO = ("sm90", "sm80", "wmma")
"""What ``kernel="auto"`` chooses from: the first that can do it, or the next where that is faster."""


def fastest_first(problem: Problem, chip: Chip) -> list[str]:
    """What ``kernel="auto"`` tries for a problem."""
    return sorted(AUTO, key=lambda name: name == "sm80" and _sm80.leaves_to_wmma(problem, chip))


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
    mod_kind: Literal["callable", "expression"] = "expression"

    def __init__(self, device: Device, *, tf32: bool = False) -> None:
        self.device = device
        self._tf32 = tf32

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.device.empty(shape, dtype)

    def temporaries(self) -> AbstractContextManager[None]:
        return self.device.temporaries()

    def pointer(self, array: Array) -> int:
        return self.device.pointer(array)

    def _call(self, problem: Problem, operands: Mapping[str, Operand], deterministic: bool = False) -> Call:
        number = "tfloat32" if problem.dtype == "float32" and self._tf32 else problem.dtype
        return Call(self.device, number, problem, operands, Options.of(problem, operands), deterministic)

    def family_name(self, call: Call, kernel: str, *, backward: bool = False) -> str:
        """The family that `kernel` names; for "auto" the fastest that can do it."""
        names = fastest_first(call.problem, call.chip) if kernel == "auto" else [kernel]
        reasons = {name: self._why_not(call, name, backward) for name in names}
        able = [name for name, reason in reasons.items() if reason is None]
        if able:
            passes_on = not backward and able[:2] == ["sm90", "sm80"] and _sm90.is_slower_than_sm80(call)
            return able[1 if passes_on else 0]
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"kernel={kernel!r} cannot compute this call: {listed}")

    def _why_not(self, call: Call, name: str, backward: bool) -> str | None:
        family = FAMILIES[name]
        reason = family.why_not(call.problem, call.number, call.chip, call.options, call.operands)
        if backward:
            reason = reason or family.why_no_backward(call.problem, call.chip, call.options)
        return reason

    def plan_forward(self, problem: Problem, kernel_name: str, operands: Mapping[str, Operand]) -> Run:
        """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
        call = self._call(*heads_as_rows(problem, operands))
        return call.plan(FAMILIES[self.family_name(call, kernel_name)].plan_forward)

    def plan_backward(
        self, problem: Problem, kernel_name: str, operands: Mapping[str, Operand], *, deterministic: bool = False
    ) -> Run:
        """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
        call = self._call(problem, operands, deterministic)
        return call.plan(FAMILIES[self.family_name(call, kernel_name, backward=True)].plan_backward)

    def make_block_mask(
        self, mod: Mod, mod_args: Mapping[str, Any], shape: tuple[int, int, int, int]
    ) -> tuple[Array, Array]:
        """Which blocks of pairs a mask_mod shows in part, and which wholly: arrays of bool."""
        batch, heads, seqlen_q, seqlen_k = shape
        call = self._call(Problem("float32", batch, heads, heads, seqlen_q, seqlen_k, 1, 1, 1.0, mod=mod), {})
        blocks = (batch, heads, ceil_div(seqlen_q, BLOCK_SIZE), ceil_div(seqlen_k, BLOCK_SIZE))
        visible, full = self.device.empty(blocks, "bool"), self.device.empty(blocks, "bool")
        step = call.step((find_blocks(call.options), math.prod(blocks)))
        call.load()
        step(visible, full, options=call.options_argument({"mod_args": mod_args}))
        return visible, full
