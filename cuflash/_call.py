"""A call on a device, as kernel families plan it: problem, arrays and options, and how kernels are launched on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._device import Chip, Device, Launch
from ._kernel import Kernel
from ._options import Options, explain
from ._params import fill
from ._problem import Operand, Problem

Run = Callable[..., None]
"""A planned pass: a function of its arrays, and of those of the options by name."""


def _launch_nothing(num_blocks: int, arguments: tuple[Any, ...]) -> None:
    """Where there are no blocks of threads, there is nothing to compute."""


@dataclass
class Step:
    """A kernel, to be launched on arrays once its call is loaded."""

    kernel: Kernel
    num_blocks: int
    params: Any
    launch: Launch = _launch_nothing

    def __call__(self, *arrays: Any, options: tuple[Any, ...] = ()) -> None:
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
    steps: list[Step] = field(default_factory=list, init=False)

    @property
    def chip(self) -> Chip:
        return self.device.chip

    def plan(self, family: Callable[[Call], Run]) -> Run:
        """What a family plans for the call, ready to run."""
        run = family(self)
        self.load()
        return run

    def load(self) -> None:
        """Compile the kernels of all steps, at the same time."""
        steps = [step for step in self.steps if step.num_blocks]
        try:
            launches = self.device.load([step.kernel.source for step in steps])
        except RuntimeError as error:
            explained = explain(self.problem.mod, str(error))
            if explained is None:
                raise
            raise ValueError(explained) from error
        for step, launch in zip(steps, launches, strict=True):
            step.launch = launch

    def add(self, made: tuple[Kernel, int], params: Any = None) -> Step:
        """A kernel, to be launched with so many blocks of threads, and with these parameters behind its arrays."""
        kernel, num_blocks = made
        problem = self.problem
        if max(problem.batch, problem.num_heads) >= 2**31:
            raise NotImplementedError(f"batch {problem.batch}, heads {problem.num_heads}: kernels count to {2**31 - 1}")
        if num_blocks >= 2**31:
            raise NotImplementedError(f"the call needs {num_blocks} blocks of threads; a GPU takes {2**31 - 1}")
        step = Step(kernel, num_blocks, params)
        self.steps.append(step)
        return step

    def step(self, made: tuple[Kernel, int], **workspaces: Operand) -> Step:
        """The same with the parameters that most kernels have: the problem, the operands and these workspaces."""
        params = fill(made[0].params, self.problem, {**self.operands, **workspaces})
        return self.add(made, self.device.struct(params))

    def options_argument(self, extras: Mapping[str, Any]) -> tuple[Any, ...]:
        """The argument that tells kernels the options of a run; plain kernels have none."""
        if not self.options.features:
            return ()
        return (self.device.struct(self.options.fill(extras, self.device.pointer)),)
