"""``python -m cuflash bench``: measure attention against its peers; make tables and plots of the results."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cuflash._cli import console
from cuflash._cli.bench import plots, records, tables
from cuflash._cli.bench.cells import OPS
from cuflash._cli.bench.contenders import PEERS
from cuflash._cli.bench.machine import Machine, dtype_named
from cuflash._cli.bench.sweeps import GPU_ONLY, SWEEPS, Choice, Outcome, Step, plan
from cuflash._cli.bench.timing import describe
from cuflash._jit.sources import sources_digest
from cuflash._launch import FAMILIES

RESULTS = Path("bench/results")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure attention against its peers",
        description="Measure attention against its peers; make tables and plots of the results.",
        epilog="Without a GPU the NumPy backend is measured against plain NumPy attention.",
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=SWEEPS,
        default=["quick"],
        help="what to measure: speed (quick, the default, or cells, the full table), peak memory (memory), host time "
        "of a small call (host), first call of a process (compile), plain attention beside FlashAttention-1 and 2 "
        "(history), options of attention beside plain (variants)",
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="default: both")
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=("auto", *FAMILIES),
        default=[],
        help="default: all that 'auto' chooses from and that the GPU can run",
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all that can be imported")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: bfloat16 on a GPU that has it, else float16; float32 on a CPU",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where results go (default on a GPU: {RESULTS}; on a CPU: nowhere)",
    )
    parser.add_argument(
        "--budget", type=_seconds, metavar="SECONDS", help="stop before the next step when this time has passed"
    )
    parser.add_argument("--cpu", action="store_true", help="measure the CPU even where there is a GPU")
    parser.add_argument(
        "--tables",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing; make the tables in these documents anew, from the results in --out",
    )
    parser.add_argument("--check", action="store_true", help="with --tables: only tell whether they are up to date")
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a number >= 0")
    return seconds


def run(options: argparse.Namespace) -> int:
    if options.tables:
        return fill_documents(options.tables, options.out or RESULTS, check=options.check)
    if options.check:
        raise SystemExit("python -m cuflash bench: error: --check needs the documents to check: --tables FILE")
    machine = _cpu() if options.cpu else _find_machine()
    # What cannot be had is refused now, and not in every step or after the first.
    if machine.kind == "cpu" and (missing := [kernel for kernel in options.kernel if kernel != "auto"]):
        raise SystemExit(f"python -m cuflash bench: error: --kernel {' '.join(missing)} needs a GPU")
    directory = options.out or (RESULTS if machine.kind == "gpu" else None)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    dtype = options.dtype or machine.default_dtype
    dtype_named(dtype)
    choice = Choice(ops=options.op, kernels=options.kernel, peers=_available(options.peers, machine), dtype=dtype)
    steps: list[Step] = []
    for sweep in dict.fromkeys(options.sweep):
        if machine.kind == "cpu" and sweep in GPU_ONLY:
            print(f"The sweep {sweep!r} needs a GPU: left out.")
        else:
            steps += plan(machine, sweep, choice)
    path = directory / records.file_name(machine.head()["device"]) if directory else None
    failed = measure(machine, steps, path, options.budget)
    return 1 if failed else 0


def measure(machine: Machine, steps: list[Step], path: Path | None, budget: float | None) -> bool:
    """Run the steps until the budget is spent; save after each; show and draw the results in the end.

    Returns whether a kernel of ours could not be measured.
    """
    measured: dict[str, list[records.Record]] = {}
    results: records.Results = {}
    failed = False
    started = time.monotonic()
    with console.progress(len(steps)) as progress:
        try:
            for number, step in enumerate(steps):
                if budget is not None and time.monotonic() - started > budget:
                    progress.note(f"the budget of {budget:g} s is spent: {len(steps) - number} steps are left out")
                    break
                progress.start(step.label)
                try:
                    outcome = step.run()
                except Exception as error:  # the inputs do not fit into memory, say: the next step may run
                    outcome = Outcome([], {"bench": describe(error)})
                failed |= bool(outcome.failures)
                for line in _summary(outcome):
                    progress.note(line)
                measured.setdefault(step.section, []).extend(outcome.records)
                results = _save(machine, measured, path)
        except KeyboardInterrupt:
            progress.note("interrupted: what has been measured is kept")
    if not any(measured.values()):
        print("Nothing was measured.")
        return failed
    _show(records.merge({}, _head(machine), measured))
    if path is not None:
        print(f"\nResults: {path}")
        try:
            drawn = plots.draw(results, path.with_suffix(""))
        except ImportError as error:
            print(f'No plots: {describe(error)}. Try: pip install ".[bench]" in a clone of cuflash')
        else:
            print("\n".join(f"Plot:    {file}" for file in drawn))
    return failed


def fill_documents(documents: list[Path], directory: Path, *, check: bool) -> int:
    """Make the marked blocks of documents anew, or with ``check`` tell whether they are."""
    stale = []
    for document in documents:
        try:
            old = document.read_text(encoding="utf-8")
            new = tables.fill(old, lambda device: tables.results_in(directory, device))
        except ValueError as error:  # of the document, or of the results
            raise SystemExit(f"python -m cuflash bench: error: {document}: {error}") from None
        if new != old:
            stale.append(document)
            if not check:
                document.write_text(new, encoding="utf-8")
    verb = "is not what the results say" if check else "made anew"
    for document in stale:
        print(f"{document}: {verb}")
    return 1 if check and stale else 0


def _save(machine: Machine, measured: dict[str, list[records.Record]], path: Path | None) -> records.Results:
    if path is None:
        return {}
    results = records.merge(records.load(path), _head(machine), measured)
    records.save(path, results)
    return results


def _head(machine: Machine) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**machine.head(), "date": now, "sources_digest": sources_digest()}


def _show(results: records.Results) -> None:
    print(f"\n{tables.device(results)}")
    for make in tables.TABLES.values():
        table = make(results)
        if table.rows:
            console.show(table)


def _summary(outcome: Outcome) -> list[str]:
    """One line for each kernel of a step, and one for everybody who failed."""
    lines = [f"{kernel} failed: {reason}" for kernel, reason in outcome.failures.items()]
    for record in outcome.records:
        beside = {name: peer for name, peer in record.get("peers", {}).items() if "error" not in peer}
        numbers = [f"{record['kernel']} {_reading(record)}"]
        numbers += [f"{name} {_reading(peer)}" for name, peer in beside.items()]
        lines.append(" | ".join(numbers))
    if outcome.records:
        for name, peer in outcome.records[0].get("peers", {}).items():
            if "error" in peer:
                lines.append(f"{name}: {peer['error']}")
    return lines


def _reading(entry: dict[str, Any]) -> str:
    if "ms" in entry:
        return f"{entry['ms']:.4g} ms"
    if "us" in entry:
        return f"{entry['us']:.1f} us"
    if "peak_bytes" in entry:
        return f"{entry['peak_bytes'] / 2**20:.1f} MiB"
    return f"{entry['cold_s']:.2f} s with an empty cache, {entry['warm_s']:.2f} s with a warm one"


def _find_machine() -> Machine:
    """The current GPU, or with the reason why not, the CPU."""
    try:
        from cuflash._cli.bench.gpu import Gpu

        return Gpu()
    except Exception as error:
        print(
            f"No GPU to measure ({describe(error)}): measuring NumPy. `python -m cuflash info` tells what is missing."
        )
        return _cpu()


def _available(peers: Sequence[str] | None, machine: Machine) -> list[str]:
    """The peers that were asked for, or all; those of torch only where there is torch, and a GPU to compare them on."""
    torch = machine.kind == "gpu" and importlib.util.find_spec("torch") is not None
    available = [peer for peer in PEERS if torch or not peer.startswith("torch")]
    for peer in dict.fromkeys(peers or ()):
        if peer not in available:
            print(f"The peer {peer!r} needs a GPU and torch: left out.")
    return [peer for peer in (available if peers is None else peers) if peer in available]


def _cpu() -> Machine:
    from cuflash._cli.bench.cpu import Cpu

    return Cpu()
