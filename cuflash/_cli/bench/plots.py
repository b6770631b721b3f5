"""Plots made from a results file: speed over length, by head_dim and mask, and memory over length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from cuflash._cli.bench.records import Record, Results
from cuflash._cli.bench.tables import speed_unit

STYLES: dict[str, dict[str, Any]] = {
    "naive": {"color": "#9a9a9a", "marker": "x"},
    "torch-flash": {"color": "#d1702b", "marker": "s"},
    "torch-cudnn": {"color": "#5a9e3a", "marker": "^"},
}
OUR_COLORS = ("#2b5fd1", "#7a3fb8", "#0f9aa8", "#c2317d")
MEMORY_TICKS = {0: "0", 1: "1 MiB", 32: "32 MiB", 1 << 10: "1 GiB", 1 << 15: "32 GiB"}


def draw(results: Results, stem: Path) -> list[Path]:
    """Draw a file for each op and dtype that was measured: ``<stem>-forward-bfloat16.png`` and so on.

    Peak memory goes to ``<stem>-memory-bfloat16.png``.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    speed, memory = results.get("records", []), results.get("memory", [])
    drawn = []
    for dtype in sorted({record["dtype"] for record in [*speed, *memory]}):
        for op in ("forward", "backward"):
            records = [record for record in speed if record["op"] == op and record["dtype"] == dtype]
            if records:
                path = stem.with_name(f"{stem.name}-{op}-{dtype}.png")
                drawn.append(_speed(records, f"Attention {op}, {dtype}, {results['device']}", path))
        records = [record for record in memory if record["dtype"] == dtype]
        if records:
            path = stem.with_name(f"{stem.name}-memory-{dtype}.png")
            title = f"Memory beyond inputs and outputs, {dtype}, {results['device']}"
            drawn.append(_memory(records, title, path))
    return drawn


def _speed(records: Sequence[Record], title: str, path: Path) -> Path:
    unit, factor = speed_unit(records)
    masks = sorted({record["causal"] for record in records})
    head_dims = sorted({record["head_dim"] for record in records})
    figure, axes = _grid(len(masks), len(head_dims))
    for row, causal in enumerate(masks):
        for column, head_dim in enumerate(head_dims):
            panel = axes[row][column]
            shown = [r for r in records if r["causal"] == causal and r["head_dim"] == head_dim]
            _lines(panel, shown, "tflops", "ms", lambda r, ms: r["tflops"] * r["ms"] / ms, factor)
            panel.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}")
            panel.set_ylabel(unit)
            panel.set_ylim(bottom=0)
    return _finish(figure, axes, title, path)


def _memory(records: Sequence[Record], title: str, path: Path) -> Path:
    ops = [op for op in ("forward", "backward") if any(record["op"] == op for record in records)]
    figure, axes = _grid(1, len(ops))
    for column, op in enumerate(ops):
        panel = axes[0][column]
        shown = [record for record in records if record["op"] == op]
        _lines(panel, shown, "peak_bytes", "peak_bytes", lambda _, peak: peak, 1 / (1 << 20))
        panel.set_title(f"{op}, head_dim {shown[0]['head_dim']}, {shown[0]['heads']} heads")
        panel.set_yscale("symlog", linthresh=1 / 8)
        panel.set_ylim(bottom=-1 / 16)
        panel.set_yticks(list(MEMORY_TICKS), MEMORY_TICKS.values())
    return _finish(figure, axes, title, path)


def _lines(panel: Any, records: Sequence[Record], own: str, peer_key: str, peer_value: Any, factor: float) -> None:
    """A line for each kernel and for each peer that was measured."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        points.setdefault(record["kernel"], {})[record["seqlen"]] = record[own] * factor
        for name, peer in record.get("peers", {}).items():
            if peer_key in peer:
                points.setdefault(name, {})[record["seqlen"]] = peer_value(record, peer[peer_key]) * factor
    colors = cycle(OUR_COLORS)
    for name, line in points.items():
        seqlens = sorted(line)
        style = STYLES.get(name) or {"color": next(colors), "marker": "o", "linewidth": 2.2}
        label = name if name in STYLES else f"cuflash {name}"
        panel.plot(seqlens, [line[seqlen] for seqlen in seqlens], label=label, **style)
    lengths = sorted({record["seqlen"] for record in records})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    panel.minorticks_off()
    panel.set_xlabel("sequence length")
    panel.grid(alpha=0.3)


def _grid(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False, layout="constrained")


def _finish(figure: Any, axes: Any, title: str, path: Path) -> Path:
    from matplotlib import pyplot

    entries = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    figure.suptitle(title)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
