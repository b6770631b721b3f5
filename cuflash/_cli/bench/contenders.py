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
    operands = operands_of(machine, cell)
    return {
        name: partial(attention, op, operands, {"causal": cell.causal, "kernel": kernel})
        for name, kernel in names.items()
    }


def attention(
    op: Op,
    operands: tuple[Any, ...],
    options: Mapping[str, Any],
    *,
    cu_seqlens: tuple[Any, ...] = (),
    gradients: Mapping[str, Any] | None = None,
) -> Contender:
    """A call of cuflash on dout, q, k and v, of packed sequences if there are two ``cu_seqlens``.

    ``gradients`` are the options that only a backward call has.
    """
    dout, q, k, v = operands
    forward: Any = cuflash.attention_varlen if cu_seqlens else cuflash.attention
    backward: Any = cuflash.attention_varlen_backward if cu_seqlens else cuflash.attention_backward
    if op == "forward":
        return Contender(lambda: forward(q, k, v, *cu_seqlens, **options))
    out, lse = forward(q, k, v, *cu_seqlens, return_lse=True, **options)
    asked = {**options, **(gradients or {})}
    return Contender(lambda: backward(dout, q, k, v, out, lse, *cu_seqlens, **asked))


def peers(machine: Machine, op: Op, cell: Cell, names: Sequence[str]) -> dict[str, Prepare]:
    """Other people's attention, by name; torch only where it can be imported and the machine is a GPU."""
    operands = operands_of(machine, cell)
    run = _peer_forward if op == "forward" else _peer_backward
    return {name: partial(run, name, machine, operands, cell.causal) for name in names}


def naive_training_step(machine: Machine, cell: Cell) -> Contender:
    """The naive backward pass together with the forward pass that makes its matrix of weights."""
    dout, q, k, v = operands_of(machine, cell)
    return Contender(lambda: naive.backward(machine, dout, q, k, v, naive.weights(machine, q, k, cell.causal)))


def operands_of(machine: Machine, cell: Cell) -> tuple[Any, ...]:
    """dout, q, k and v."""
    shapes = (cell.shape, cell.shape, cell.shape_kv, cell.shape_kv)
    return tuple(machine.normal(shape, cell.dtype, seed) for seed, shape in enumerate(shapes))


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
