"""Tables made from a results file, for the terminal and for the documents: nobody types a measured number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cuflash._cli.bench.cells import HISTORY, OPS
from cuflash._cli.bench.records import Record, Results, digests, fastest, load
from cuflash._cli.bench.variants import VARIANTS
from cuflash._cli.console import Table

CELL_COLUMNS = ("op", "dtype", "D", "mask", "S", "B × H")
SUMMARY_SEQLEN = 4096
SUMMARY_HEAD_DIM = 128
PADDING_BAR = 0.9  # of the speed-up that the share of padding suggests
NOT_MEASURED = "*Not measured yet.*"
BEGIN = re.compile(r"<!-- bench:")
BLOCK = re.compile(r"(<!-- bench:([a-z]+)(?:@([\w.-]+))? -->\n)(?:(?!<!-- bench:).)*?(<!-- /bench -->)", re.DOTALL)


def speed(results: Results, op: str) -> Table:
    """FLOP/s of an op."""
    records = [record for record in results.get("records", []) if record["op"] == op]
    return _speed_table(op.capitalize(), records)


def summary(results: Results) -> Table:
    """FLOP/s of both ops at one length, `SUMMARY_SEQLEN`."""
    records = [record for record in results.get("records", []) if record["seqlen"] == SUMMARY_SEQLEN]
    return _speed_table(f"{SUMMARY_SEQLEN} tokens", records)


def _speed_table(title: str, records: Sequence[Record]) -> Table:
    """By op and cell: our kernels, their peers, and how many times as fast as each peer our best one is."""
    kernels, peers = _names(record["kernel"] for record in records), _peers(records)
    unit, factor = speed_unit(records)
    rows = []
    for cell in _grouped(records):
        ours = {record["kernel"]: record["tflops"] for record in cell}
        best = fastest(cell)
        theirs = {name: best.get("peers", {}).get(name, {}) for name in peers}
        tflops = {name: _peer_tflops(best, peer) for name, peer in theirs.items()}
        rows.append(
            [
                *_cell_columns(best),
                *(_number(ours.get(kernel), factor) for kernel in kernels),
                *(_number(tflops[name], factor) or _failure(peer) for name, peer in theirs.items()),
                *(_ratio(best["tflops"], value) for value in tflops.values()),
            ]
        )
    columns = [*CELL_COLUMNS, *kernels, *peers, *(f"× {name}" for name in peers)]
    return Table(f"{title}, {unit}", columns, rows)


def speed_unit(records: Sequence[Record]) -> tuple[str, float]:
    """A unit in which the records' TFLOP/s are readable numbers, and the factor to it."""
    fastest = max((record["tflops"] for record in records), default=0)
    return ("TFLOP/s", 1.0) if fastest >= 2 else ("GFLOP/s", 1e3)


def memory(results: Results) -> Table:
    """Peak memory beyond inputs and outputs, by length."""
    records = results.get("memory", [])
    kernels, peers = _names(record["kernel"] for record in records), _peers(records)
    rows = []
    for cell in _grouped(records):
        ours = {record["kernel"]: record for record in cell}
        theirs = cell[0].get("peers", {})
        rows.append(
            [
                *_cell_columns(cell[0]),
                *(_bytes(ours.get(kernel, {})) for kernel in kernels),
                *(_bytes(theirs.get(name, {})) or _failure(theirs.get(name, {})) for name in peers),
            ]
        )
    return Table("Peak memory beyond inputs and outputs", [*CELL_COLUMNS, *kernels, *peers], rows)


def host(results: Results) -> Table:
    """Microseconds that a small call keeps the host busy."""
    records = results.get("host", [])
    peers = _peers(records)
    rows = [
        [
            *_cell_columns(record),
            record["kernel"],
            f"{record['us']:.1f}",
            *(_number(record["peers"].get(name, {}).get("us"), 1) for name in peers),
        ]
        for record in records
    ]
    return Table("Host time of a small call, microseconds", [*CELL_COLUMNS, "kernel", "cuflash", *peers], rows)


def compilation(results: Results) -> Table:
    """Seconds until the first result."""
    rows = [
        [
            record["op"],
            record["kernel"],
            record["dtype"],
            str(record["head_dim"]),
            record.get("variant", "plain"),
            str(record["num_kernels"]),
            f"{record['cold_s']:.2f}",
            f"{record['warm_s']:.2f}",
        ]
        for record in results.get("compile", [])
    ]
    columns = ["op", "kernel", "dtype", "D", "options", "kernels built", "empty cache", "warm cache"]
    return Table("First call of a process, seconds", columns, rows)


def history(results: Results) -> Table:
    """Time and peak memory of plain attention, FlashAttention-1 and FlashAttention-2, by length."""
    records = results.get("history", [])
    kernels = [name for name in HISTORY["forward"] if any(record["kernel"] == name for record in records)]
    rows = []
    for cell in _grouped(records):
        ours = {record["kernel"]: record for record in cell}
        rows.append(
            [
                *_cell_columns(cell[0]),
                *(_number(ours.get(kernel, {}).get("ms"), 1) for kernel in kernels),
                *(_bytes(ours.get(kernel, {})) for kernel in kernels),
            ]
        )
    columns = [*CELL_COLUMNS, *(f"{name}, ms" for name in kernels), *(f"{name}, memory" for name in kernels)]
    return Table("Plain attention (naive), FlashAttention-1 (fa1) and FlashAttention-2 (wmma)", columns, rows)


def variants(results: Results) -> Table:
    """FLOP/s of the variants, forward and backward, and their share of the plain rate."""
    records = results.get("variants", [])
    unit, factor = speed_unit(records)
    rows = []
    for ops in _variant_cells(records):
        cell = next(iter(ops.values()))
        row = [cell["variant"], cell["kernel"], str(cell["head_dim"]), str(cell["seqlen"])]
        for op in OPS:
            record = ops.get(op, {})
            row += [_number(record.get("tflops"), factor), _share(record.get("ratio"))]
        rows.append([*row, _share(bar_of(cell))])
    columns = ["variant", "kernel", "D", "S", "forward", "× plain", "backward", "× plain", "bar"]
    return Table(f"Variants, {unit} of the work really done", columns, rows)


def ratios(results: Results) -> Table:
    """The variants' share of the plain rate, at one head dimension, `SUMMARY_HEAD_DIM`."""
    records = [record for record in results.get("variants", []) if record["head_dim"] == SUMMARY_HEAD_DIM]
    rows = []
    for ops in _variant_cells(records):
        cell = next(iter(ops.values()))
        shares = (_share(ops.get(op, {}).get("ratio")) for op in OPS)
        rows.append([cell["variant"], cell["kernel"], str(cell["seqlen"]), *shares, _share(bar_of(cell))])
    columns = ["variant", "kernel", "S", "forward", "backward", "bar"]
    return Table(f"Rate of the variants as a share of the plain rate, D {SUMMARY_HEAD_DIM}", columns, rows)


def padding(results: Results) -> Table:
    """How many times as fast packed sequences are as padded ones."""
    rows = []
    for record in results.get("variants", []):
        padded = record.get("peers", {}).get("padded", {})
        if "ms" in padded:
            suggested = 1 / (1 - record["padding"])
            share, speed_up = f"{100 * record['padding']:.0f} %", f"{padded['ms'] / record['ms']:.2f}"
            names = (record["op"], record["kernel"], record["dtype"], str(record["head_dim"]))
            rows.append([*names, share, speed_up, _share(PADDING_BAR * suggested)])
    columns = ["op", "kernel", "dtype", "D", "padding", "× padded", "bar"]
    return Table("Packed sequences beside the same padded to the longest", columns, rows)


def _variant_cells(records: Sequence[Record]) -> list[dict[str, Record]]:
    """The records of each variant and cell by op, in the order of `VARIANTS`."""
    cells: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        place = ORDER.get(record["variant"], len(ORDER))
        fields = ("variant", "kernel", "dtype", "head_dim", "seqlen", "batch", "heads", "heads_kv")
        cells.setdefault((place, *(record[field] for field in fields)), {})[record["op"]] = record
    return [cells[key] for key in sorted(cells)]


def device(results: Results) -> str:
    """One sentence on where the numbers come from."""
    versions = [
        ("driver", "driver"),
        ("CUDA", "cuda"),
        ("CuPy", "cupy"),
        ("NumPy", "numpy"),
        ("PyTorch", "torch"),
    ]
    parts = [f"{name} {results[key]}" for name, key in versions if results.get(key)]
    sources = ", ".join(sorted(digest[:12] for digest in digests(results)))
    return f"{results['device']}, {', '.join(parts)}, {results['date'][:10]}, sources {sources}."


TABLES: dict[str, Callable[[Results], Table]] = {
    "summary": summary,
    "forward": lambda results: speed(results, "forward"),
    "backward": lambda results: speed(results, "backward"),
    "memory": memory,
    "host": host,
    "compile": compilation,
    "history": history,
    "variants": variants,
    "ratios": ratios,
    "padding": padding,
}
NAMES = ("device", *TABLES)

_BY_NAME = {variant.name: variant for variant in VARIANTS}
ORDER = {name: place for place, name in enumerate(_BY_NAME)}


def bar_of(record: Record) -> float | None:
    """The least share of the plain rate that is asked for of a variant and kernel family."""
    variant = _BY_NAME.get(record["variant"])
    return None if variant is None else variant.bar_of(record["kernel"])


def block(results: Results, name: str) -> str:
    """The Markdown of one marked block."""
    if name == "device":
        return device(results) if results else NOT_MEASURED
    table = TABLES[name](results)
    return f"{table.title}:\n\n{table.markdown()}" if table.rows else NOT_MEASURED


def fill(text: str, results_of: Callable[[str | None], Results]) -> str:
    """A document with its blocks made anew.

    A block is what stands between ``<!-- bench:NAME -->`` or ``<!-- bench:NAME@DEVICE -->`` and
    ``<!-- /bench -->``, each on a line of its own; NAME is one of `NAMES`, DEVICE the name of a results file
    without its ".json".
    """

    def replace(match: re.Match[str]) -> str:
        begin, name, device_name, end = match.groups()
        if name not in NAMES:
            raise ValueError(f"bench:{name}: there is no such block; allowed are {', '.join(NAMES)}")
        return f"{begin}{block(results_of(device_name), name)}\n{end}"

    filled, count = BLOCK.subn(replace, text)
    begun = len(BEGIN.findall(text))
    if begun != count:
        raise ValueError(f"<!-- bench: begins {begun} blocks, and {count} have a name and an end, <!-- /bench -->")
    return filled


def results_in(directory: Path, device_name: str | None) -> Results:
    """The results of a device; without a name, those of the only GPU that was measured."""
    if device_name is not None:
        return load(directory / f"{device_name}.json")
    measured = [load(path) for path in sorted(directory.glob("*.json"))]
    gpus = [results for results in measured if results["cuda"] is not None]
    if len(gpus) > 1:
        devices = ", ".join(results["device"] for results in gpus)
        raise ValueError(f"{directory} has results of {devices}: say which one is meant, bench:NAME@DEVICE")
    return gpus[0] if gpus else {}


def _cell_columns(record: Record) -> list[str]:
    mask = "causal" if record["causal"] else "full"
    sizes = f"{record['batch']} × {record['heads']}"
    return [record["op"], record["dtype"], str(record["head_dim"]), mask, str(record["seqlen"]), sizes]


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _peers(records: Sequence[Record]) -> list[str]:
    """The peers that were measured at least once."""
    return _names(name for record in records for name, peer in record.get("peers", {}).items() if "error" not in peer)


def _grouped(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each cell, forward first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cell = (record[field] for field in ("dtype", "head_dim", "causal", "seqlen", "batch", "heads"))
        groups.setdefault((record["op"] == "backward", *cell), []).append(record)
    return [groups[key] for key in sorted(groups)]


def _peer_tflops(record: Record, peer: Record) -> float | None:
    return record["tflops"] * record["ms"] / peer["ms"] if "ms" in peer else None


def _failure(peer: Record) -> str:
    reason = peer.get("error", "")
    return "out of memory" if "MemoryError" in reason else "failed" if reason else ""


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    scaled = value * factor
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(ours: float, theirs: float | None) -> str:
    return "" if theirs is None else f"{ours / theirs:.2f}"


def _bytes(entry: Record) -> str:
    if "peak_bytes" not in entry:
        return ""
    value = entry["peak_bytes"]
    if value == 0:
        return "0"
    if value < 1 << 20:
        return f"{value / (1 << 10):.0f} KiB"
    return f"{value / (1 << 20):.1f} MiB" if value < 1 << 30 else f"{value / (1 << 30):.1f} GiB"
