"""Running problems on kernels: choose a family, fill the parameters, launch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import _fa1, _naive, _wmma
from ._device import Array, Device, Launch
from ._kernel import Kernel, find_blocks
from ._options import BLOCK_SIZE, Options, explain
from ._params import fill
from ._problem import Mod, Operand, Problem, ceil_div

FAMILIES = {"wmma": _wmma, "fa1": _fa1, "naive": _naive}
AUTO = ("wmma",)


@dataclass(frozen=True)
class _Step:
    """A kernel, ready to be launched on arrays; without a launch where there is nothing to compute."""

    launch: Launch | None
    num_blocks: int
    params: Any

    def __call__(self, *arrays: Any, options: tuple[Any, ...] = ()) -> None:
        if self.launch is not None:
            self.launch(self.num_blocks, (*arrays, self.params, *options))


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

    def pointer(self, array: Array) -> int:
        return self.device.pointer(array)

    def _number(self, problem: Problem) -> str:
        return "tfloat32" if problem.dtype == "float32" and self._tf32 else problem.dtype

    def family_name(self, problem: Problem, options: Options, kernel: str) -> str:
        """The family that `kernel` names; for "auto" the first, and so the fastest, that can do it."""
        reasons = {}
        for name in AUTO if kernel == "auto" else (kernel,):
            reason = FAMILIES[name].why_not(problem, self._number(problem), self.device.chip, options)
            if reason is None:
                return name
            reasons[name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"kernel={kernel!r} cannot compute this call: {listed}")

    def _step(self, made: tuple[Kernel, int], problem: Problem, operands: dict[str, Operand]) -> _Step:
        kernel, num_blocks = made
        if max(problem.batch, problem.num_heads) >= 2**31:
            raise NotImplementedError(f"batch {problem.batch}, heads {problem.num_heads}: kernels count to {2**31 - 1}")
        if num_blocks >= 2**31:
            raise NotImplementedError(f"the call needs {num_blocks} blocks of threads; a GPU takes {2**31 - 1}")
        launch = self._load(kernel, problem.mod) if num_blocks else None
        return _Step(launch, num_blocks, self.device.struct(fill(kernel.params, problem, operands)))

    def _load(self, kernel: Kernel, mod: Mod | None) -> Launch:
        try:
            return self.device.load(kernel.source)
        except RuntimeError as error:
            explained = explain(mod, str(error))
            if explained is None:
                raise
            raise ValueError(explained) from error

    def _struct(self, options: Options, extras: Mapping[str, Any]) -> tuple[Any, ...]:
        """The argument that tells kernels the options; plain kernels have none."""
        if not options.features:
            return ()
        return (self.device.struct(options.fill(extras, self.device.pointer)),)

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
        options = Options.of(problem, operands)
        name = self.family_name(problem, options, kernel_name)
        if name == "naive":
            return _naive.plan_forward(problem, operands)
        if name == "fa1":
            return self._plan_fa1(problem, operands)
        family = FAMILIES[name]
        made = family.forward(problem, options, self._number(problem), self.device.chip)
        step = self._step(made, problem, operands)

        def forward(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
            lse = self.device.null if lse is None else lse
            step(q, k, v, out, lse, options=self._struct(options, extras))

        return forward

    def _plan_fa1(self, problem: Problem, operands: dict[str, Operand]) -> Any:
        made = _fa1.forward(problem, self._number(problem), self.device.chip)
        step = self._step(made, problem, operands)
        shapes = _fa1.workspaces(problem, made[0])

        def forward(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
            workspaces = (self.device.empty(shape, "float32") for shape in shapes)
            step(q, k, v, out, self.device.null if lse is None else lse, *workspaces)

        return forward

    def plan_backward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
        options = Options.of(problem, operands)
        name = self.family_name(problem, options, kernel_name)
        if name == "naive":
            return _naive.plan_backward(problem, operands)
        if name == "fa1":
            raise NotImplementedError(f"kernel={kernel_name!r} cannot compute gradients: {_fa1.why_no_backward()}")
        family, number, chip = FAMILIES[name], self._number(problem), self.device.chip
        delta_shape = (1 if problem.packed else problem.batch, problem.num_heads, problem.seqlen_q)
        batch_stride = 0 if problem.packed else problem.num_heads * problem.seqlen_q
        delta_operand = Operand((*delta_shape, 1), (batch_stride, problem.seqlen_q, 1, 0))
        operands = {**operands, "delta": delta_operand}
        delta_step = self._step(family.delta(problem, number), problem, operands)
        dbias_step = dsinks_step = None
        rows = problem.batch * problem.seqlen_q  # without any there is nothing to sum, and no sequence to look at
        if "dbias" in operands and rows * problem.seqlen_k:
            made = family.backward_dbias(problem, options, number, chip, operands["dbias"])
            dbias_step = self._step(made, problem, operands)
        if "dsinks" in operands and rows:
            dsinks_step = self._step(family.dsinks(problem, options, operands["dsinks"].dtype), problem, operands)
        dkdv_step = self._step(family.backward_dkdv(problem, options, number, chip), problem, operands)
        dq_step = self._step(family.backward_dq(problem, options, number, chip), problem, operands)

        def backward(
            dout: Array,
            q: Array,
            k: Array,
            v: Array,
            out: Array,
            lse: Array,
            dq: Array,
            dk: Array,
            dv: Array,
            dlse: Array | None = None,
            dbias: Array | None = None,
            dsinks: Array | None = None,
            **extras: Any,
        ) -> None:
            delta = self.device.empty(delta_shape, "float32")
            struct = self._struct(options, extras)
            delta_step(out, dout, self.device.null if dlse is None else dlse, delta)
            dkdv_step(q, k, v, dout, lse, delta, dk, dv, options=struct)
            dq_step(q, k, v, dout, lse, delta, dq, options=struct)
            if dbias_step is not None:
                dbias_step(q, k, v, dout, lse, delta, dbias, options=struct)
            elif dbias is not None:
                dbias[...] = 0
            if dsinks_step is not None:
                dsinks_step(lse, delta, dsinks, options=struct)
            elif dsinks is not None:
                dsinks[...] = 0

        return backward

    def make_block_mask(
        self, mod: Mod, mod_args: Mapping[str, Any], shape: tuple[int, int, int, int]
    ) -> tuple[Array, Array]:
        """Which blocks of pairs a mask_mod shows in part, and which wholly: arrays of bool."""
        batch, heads, seqlen_q, seqlen_k = shape
        problem = Problem("float32", batch, heads, heads, seqlen_q, seqlen_k, 1, 1, 1.0, mod=mod)
        options = Options.of(problem, {})
        blocks = (batch, heads, ceil_div(seqlen_q, BLOCK_SIZE), ceil_div(seqlen_k, BLOCK_SIZE))
        visible, full = self.device.empty(blocks, "bool"), self.device.empty(blocks, "bool")
        step = self._step((find_blocks(options), math.prod(blocks)), problem, {})
        step(visible, full, options=self._struct(options, {"mod_args": mod_args}))
        return visible, full
