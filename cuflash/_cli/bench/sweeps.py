"""The sweeps: what is measured, as steps, each of which makes records for one section of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cuflash._cli.bench import ahead, contenders, first_call
from cuflash._cli.bench.cells import HISTORY, Cell, Op, flops, history_cells, memory_cells, small_cell, timed_cells
from cuflash._cli.bench.machine import Machine
from cuflash._cli.bench.records import Record
from cuflash._cli.bench.timing import Failure, Spread, describe, measure_in_turn
from cuflash._cli.bench.variants import PLAIN, SCORE_MOD, SIZES, VARIANTS, Variant, padded

SWEEPS = ("quick", "cells", "memory", "host", "compile", "history", "variants")
GPU_ONLY = ("host", "compile", "history")

# Options that nobody has compiled together before, and the name of their records.
COMBINATION = "softcap, dropout, score_mod"
COMBINED = {"causal": True, "softcap": 30.0, "dropout_p": 0.17, "seed": 7, "score_mod": SCORE_MOD["gpu"]}


@dataclass(frozen=True)
class Outcome:
    """The records that a step has made, and the kernels of ours that could not make one, with the reason."""

    records: list[Record]
    failures: dict[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One unit of work: what is measured together, and the section of the results it belongs to."""

    section: str
    label: str
    run: Callable[[], Outcome]


@dataclass(frozen=True)
class Choice:
    """What the user wants to be measured; of kernels, none means those of `Machine.kernels`."""

    ops: Sequence[Op]
    kernels: Sequence[str]
    peers: Sequence[str]
    dtype: str


def plan(machine: Machine, sweep: str, choice: Choice) -> list[Step]:
    """The steps of a sweep."""
    if sweep == "host":
        return [Step("host", f"host time, {small_cell(choice.dtype)}", partial(_host, machine, choice))]
    if sweep == "compile":
        return [
            Step("compile", f"first {op} call, D {head_dim}", partial(_compile, machine, op, head_dim, choice))
            for head_dim in (64, 128, 256)
            for op in choice.ops
        ] + [
            Step(
                "compile",
                f"first {op} call, D {head_dim}, {COMBINATION}",
                partial(_compile, machine, op, head_dim, choice, COMBINATION, COMBINED),
            )
            for head_dim in (64, 128)
            for op in choice.ops
        ]
    if sweep == "memory":
        return [
            Step("memory", f"peak memory, {op} {cell}", partial(_memory, machine, op, cell, choice))
            for cell in memory_cells(machine.kind, choice.dtype)
            for op in choice.ops
        ]
    if sweep == "history":
        return [
            Step("history", f"plain, v1 and v2, {op} {cell}", partial(_history, machine, op, cell))
            for cell in history_cells(choice.dtype)
            for op in choice.ops
        ]
    if sweep == "variants":
        return _variant_steps(machine, choice)
    return [
        Step("records", f"{op} {cell}", partial(_speed, machine, op, cell, choice))
        for cell in timed_cells(sweep, machine.kind, choice.dtype)
        for op in choice.ops
    ]


def _speed(machine: Machine, op: Op, cell: Cell, choice: Choice) -> Outcome:
    def fields(spread: Spread) -> dict[str, Any]:
        return spread.fields("ms")

    return _with_tflops(op, cell, _in_turn(machine, op, cell, choice, machine.sample, fields))


def _with_tflops(op: Op, cell: Cell, outcome: Outcome, pairs: float | None = None) -> Outcome:
    for record in outcome.records:
        record["tflops"] = _tflops(op, cell, record["ms"], pairs)
    return outcome


def _tflops(op: Op, cell: Cell, ms: float, pairs: float | None = None) -> float:
    return float(f"{flops(op, cell, pairs) / ms / 1e9:.4g}")


def _host(machine: Machine, choice: Choice) -> Outcome:
    def fields(spread: Spread) -> dict[str, Any]:
        return (spread * 1e3).fields("us")

    return _in_turn(machine, "forward", small_cell(choice.dtype), choice, machine.sample_host, fields)


def _in_turn(
    machine: Machine,
    op: Op,
    cell: Cell,
    choice: Choice,
    sample: Callable[[Any, int], Sequence[float]],
    fields: Callable[[Spread], dict[str, Any]],
) -> Outcome:
    """Time kernels and peers on a cell, in turn; one record for each kernel, with the same peers."""
    kernels = _kernels(machine, op, cell, choice)
    ready, failures = contenders.prepare(
        contenders.kernels(machine, op, cell, kernels) | contenders.peers(machine, op, cell, choice.peers)
    )
    measured: Mapping[str, Spread | Failure] = measure_in_turn(ready, sample) | failures
    ready.clear()
    machine.release()
    return _outcome(op, cell, kernels, choice.peers, measured, fields)


def _memory(machine: Machine, op: Op, cell: Cell, choice: Choice) -> Outcome:
    """Peak memory of kernels and of naive attention; its backward pass has to keep or to make the weights."""
    kernels = _kernels(machine, op, cell, choice)
    candidates = contenders.kernels(machine, op, cell, kernels)
    if "naive" in choice.peers:
        candidates |= contenders.peers(machine, op, cell, ["naive"])
        if op == "backward":
            candidates["naive"] = partial(contenders.naive_training_step, machine, cell)
    measured: dict[str, int | Failure] = {}
    for name, candidate in candidates.items():
        try:
            measured[name] = machine.peak_bytes(candidate().call)
        except Exception as error:  # out of memory is a result too
            measured[name] = describe(error)
        machine.release()
    return _outcome(op, cell, kernels, ["naive"], measured, lambda peak: {"peak_bytes": peak})


def _history(machine: Machine, op: Op, cell: Cell) -> Outcome:
    """Time and peak memory of the families, from the oldest to the newest."""
    kernels = {name: name for name in HISTORY[op]}
    ready, failures = contenders.prepare(contenders.kernels(machine, op, cell, kernels))
    spreads: dict[str, Spread | Failure] = measure_in_turn(ready, machine.sample)
    measured: dict[str, dict[str, Any] | Failure] = {**failures}
    for name, spread in spreads.items():
        machine.release()
        if isinstance(spread, Spread):
            measured[name] = {**spread.fields("ms"), "peak_bytes": machine.peak_bytes(ready[name].call)}
        else:
            measured[name] = spread
    ready.clear()
    machine.release()
    return _with_tflops(op, cell, _outcome(op, cell, kernels, [], measured, lambda fields: fields))


def _variant_steps(machine: Machine, choice: Choice) -> list[Step]:
    """A step for each variant, cell and op; one before them, which saves most of the time, compiles on all cores."""
    steps = [
        Step("variants", f"{variant.name}, {op} {cell}", partial(_variant, machine, variant, op, cell, plain, kernel))
        for variant in VARIANTS
        for cell, plain in zip(
            variant.cells(SIZES[machine.kind], choice.dtype),
            variant.plain_cells(SIZES[machine.kind], choice.dtype),
            strict=True,
        )
        for op in choice.ops
        if op in variant.ops
        for kernel in _kernels(machine, op, cell, choice).values()
    ]
    if machine.kind == "gpu":
        steps.insert(0, Step("variants", "compile the kernels", partial(_compile_ahead, machine, choice)))
    return steps


def _compile_ahead(machine: Machine, choice: Choice) -> Outcome:
    def kernels_of(op: Op, cell: Cell) -> Iterable[str]:
        return _kernels(machine, op, cell, choice).values()

    ahead.compile_variants(choice.ops, kernels_of, choice.dtype)
    return Outcome([])


def _variant(machine: Machine, variant: Variant, op: Op, cell: Cell, plain_cell: Cell, kernel: str) -> Outcome:
    """Time a variant, plain attention of the same family and cell, and for packed sequences the padded ones."""
    name = machine.kernel_name(op, cell, kernel)
    beside = {"plain": plain_cell} | ({"padded": padded(plain_cell)} if variant.packed else {})
    ready, failures = contenders.prepare(
        {name: variant.prepare(machine, op, cell, kernel)}
        | {peer: PLAIN.prepare(machine, op, peer_cell, kernel) for peer, peer_cell in beside.items()}
    )
    measured: Mapping[str, Spread | Failure] = measure_in_turn(ready, machine.sample) | failures
    ready.clear()
    machine.release()
    pairs = variant.pairs(cell)
    outcome = _with_tflops(
        op, cell, _outcome(op, cell, [name], beside, measured, lambda spread: spread.fields("ms")), pairs
    )
    for record in outcome.records:
        record |= {"variant": variant.name, "pairs": int(pairs)}
        plain = record["peers"]["plain"]
        if "ms" in plain:
            plain |= {"tflops": _tflops(op, plain_cell, plain["ms"]), "pairs": int(plain_cell.pairs)}
            record["ratio"] = round(record["tflops"] / plain["tflops"], 3)
        if variant.packed:
            tokens = beside["padded"].batch * beside["padded"].seqlen
            record["padding"] = round(1 - cell.batch * cell.seqlen / tokens, 4)
    return outcome


def _compile(
    machine: Machine,
    op: Op,
    head_dim: int,
    choice: Choice,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Outcome:
    """What the first call of a process costs, plain or with these options; their name is in the records."""
    causal = bool(options and options.get("causal"))
    cell = Cell(head_dim, causal, 128, batch=1, heads=8, dtype=choice.dtype)
    kernels = _kernels(machine, op, cell, choice)
    measured: dict[str, dict[str, Any] | Failure] = {}
    for name, kernel in kernels.items():
        try:
            measured[name] = first_call.cold_and_warm(op, cell, kernel, options)
        except Exception as error:
            measured[name] = describe(error)
    named = {} if variant is None else {"variant": variant}
    return _outcome(op, cell, kernels, [], measured, lambda seconds: {**named, **seconds})


def _kernels(machine: Machine, op: Op, cell: Cell, choice: Choice) -> dict[str, str]:
    """What to ask for, by the name of the family that it means: "auto" and what it picks are one."""
    kernels = choice.kernels or machine.kernels(op, cell)
    return {machine.kernel_name(op, cell, kernel): kernel for kernel in kernels}


def _outcome(
    op: Op,
    cell: Cell,
    kernels: Iterable[str],
    peers: Iterable[str],
    measured: Mapping[str, Any],
    fields: Callable[[Any], dict[str, Any]],
) -> Outcome:
    """One record for each kernel that was measured; a peer that was not has its reason in it."""

    def peer_fields(result: Any) -> dict[str, Any]:
        return {"error": result} if isinstance(result, str) else fields(result)

    beside = {name: peer_fields(measured[name]) for name in peers if name in measured}
    records, failures = [], {}
    for kernel in kernels:
        result = measured[kernel]
        if isinstance(result, str):
            failures[kernel] = result
        else:
            peers_field = {"peers": beside} if beside else {}
            records.append({"op": op, "kernel": kernel, **cell.fields, **fields(result), **peers_field})
    return Outcome(records, failures)
