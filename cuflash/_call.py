"""A call on a device, as kernel families plan it: problem, arrays and options, and how kernels are launched on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ._device import Chip, Device, Launch
from ._kernel import Kernel
from ._options import Options, explain
from ._params import fill
from ._problem import Operand, Problem

Run = Callable[..., None]
"""A planned pass: a function of its arrays, and of those of the options by name."""


@dataclass(frozen=True)
class Step:
    """A kernel, ready to be launched on arrays; without a launch where there is nothing to compute."""

    launch: Launch | None
    num_blocks: int
    params: Any

    def __call__(self, *arrays: Any, options: tuple[Any, ...] = ()) -> None:
        if self.launch is not None:
            self.launch(self.num_blocks, (*arrays, self.params, *options))


@dataclass(frozen=True)
class Call:
    """One pass to be planned.

    Parameters
    ----------
    device : Device
        Where it runs.
    number : str
        What the tensor cores multiply: the problem's dtype, or "tfloat32".
    problem : Problem
        What it computes.
    operands : mapping
        Its arrays.
    options : Options
        The features it has.
    deterministic : bool
        Whether gradients must be the same bits in every run.
    """

    device: Device
    number: str
    problem: Problem
    operands: Mapping[str, Operand]
    options: Options
    deterministic: bool = False

    @property
    def chip(self) -> Chip:
        return self.device.chip

    def launch(self, kernel: Kernel, num_blocks: int) -> Launch | None:
        """Compile a kernel, to be launched with so many blocks of threads; None if there are none."""
        problem = self.problem
        if max(problem.batch, problem.num_heads) >= 2**31:
            raise NotImplementedError(f"batch {problem.batch}, heads {problem.num_heads}: kernels count to {2**31 - 1}")
        if num_blocks >= 2**31:
            raise NotImplementedError(f"the call needs {num_blocks} blocks of threads; a GPU takes {2**31 - 1}")
        return self._load(kernel) if num_blocks else None

    def step(self, made: tuple[Kernel, int], **workspaces: Operand) -> Step:
        """The same with its parameters."""
        kernel, num_blocks = made
        params = fill(kernel.params, self.problem, {**self.operands, **workspaces})
        return Step(self.launch(kernel, num_blocks), num_blocks, self.device.struct(params))

    def _load(self, kernel: Kernel) -> Launch:
        try:
            return self.device.load(kernel.source)
        except RuntimeError as error:
            explained = explain(self.problem.mod, str(error))
            if explained is None:
                raise
            raise ValueError(explained) from error

    def options_argument(self, extras: Mapping[str, Any]) -> tuple[Any, ...]:
        """The argument that tells kernels the options of a run; plain kernels have none."""
        if not self.options.features:
            return ()
        return (self.device.struct(self.options.fill(extras, self.device.pointer)),)
