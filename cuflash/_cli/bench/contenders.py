"""Who is measured on a cell: cuflash's kernels and their peers, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import cuflash
from cuflash._cli.bench import naive
from cuflash._cli.bench.cells import Cell, Op
from cuflash._cli.bench.machine import Machine
from cuflash._cli.bench.timing import Contender, Failure, describe

PEERS = ("torch-cudnn", "torch-flash", "naive")

Prepare = Callable[[], Contender]


def prepare(factories: dict[str, Prepare]) -> tuple[dict[str, Contender], dict[str, Failure]]:
    """Make the contenders ready; those that cannot run here are told apart, with the reason."""
    ready: dict[str, Contender] = {}
    failures: dict[str, Failure] = {}
    for name, factory in factories.items():
        try:
            ready[name] = factory()
        except Exception as error:  # whatever stops one contender must not stop the others
            failures[name] = describe(error)
    return ready, failures


def kernels(machine: Machine, op: Op, cell: Cell, names: Mapping[str, str]) -> dict[str, Prepare]:
    """Kernels of cuflash, by name; ``names`` has what to ask for."""
    operands = _operands(machine, cell)
    run = _cuflash_forward if op == "forward" else _cuflash_backward
    return {name: partial(run, kernel, operands, cell.causal) for name, kernel in names.items()}


def peers(machine: Machine, op: Op, cell: Cell, names: Sequence[str]) -> dict[str, Prepare]:
    """Other people's attention, by name; torch only where it can be imported and the machine is a GPU."""
    operands = _operands(machine, cell)
    run = _peer_forward if op == "forward" else _peer_backward
    return {name: partial(run, name, machine, operands, cell.causal) for name in names}


def naive_training_step(machine: Machine, cell: Cell) -> Contender:
    """The naive backward pass together with the forward pass that makes its matrix of weights."""
    dout, q, k, v = _operands(machine, cell)
    return Contender(lambda: naive.backward(machine, dout, q, k, v, naive.weights(machine, q, k, cell.causal)))


def _operands(machine: Machine, cell: Cell) -> tuple[Any, ...]:
    """dout, q, k and v."""
    return tuple(machine.normal(cell.shape, cell.dtype, seed) for seed in range(4))


def _cuflash_forward(kernel: str, operands: tuple[Any, ...], causal: bool) -> Contender:
    _, q, k, v = operands
    return Contender(lambda: cuflash.attention(q, k, v, causal=causal, kernel=kernel))


def _cuflash_backward(kernel: str, operands: tuple[Any, ...], causal: bool) -> Contender:
    dout, q, k, v = operands
    out, lse = cuflash.attention(q, k, v, causal=causal, return_lse=True, kernel=kernel)
    return Contender(lambda: cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal, kernel=kernel))


def _peer_forward(name: str, machine: Machine, operands: tuple[Any, ...], causal: bool) -> Contender:
    _, q, k, v = operands
    if name == "naive":
        return Contender(lambda: naive.forward(machine, q, k, v, causal))
    from cuflash._cli.bench import torch_sdpa

    return torch_sdpa.forward(name, q, k, v, causal)


def _peer_backward(name: str, machine: Machine, operands: tuple[Any, ...], causal: bool) -> Contender:
    dout, q, k, v = operands
    if name == "naive":
        p = naive.weights(machine, q, k, causal)
        return Contender(lambda: naive.backward(machine, dout, q, k, v, p))
    from cuflash._cli.bench import torch_sdpa

    return torch_sdpa.backward(name, dout, q, k, v, causal)
