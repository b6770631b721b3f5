"""Plots made from a results file: speed, memory, and plain, v1 and v2, all over length; variants as bars."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from cuflash._cli.bench.records import Record, Results, fastest
from cuflash._cli.bench.tables import ORDER, bar_of, speed_unit

STYLES: dict[str, dict[str, Any]] = {
    "naive": {"color": "#9a9a9a", "marker": "x"},
    "torch-flash": {"color": "#d1702b", "marker": "s"},
    "torch-cudnn": {"color": "#5a9e3a", "marker": "^"},
}
OUR_COLORS = ("#2b5fd1", "#7a3fb8", "#0f9aa8", "#c2317d")
MEMORY_TICKS = {0: "0", 1: "1 MiB", 32: "32 MiB", 1 << 10: "1 GiB", 1 << 15: "32 GiB"}


def draw(results: Results, stem: Path) -> list[Path]:
    """Draw a file for each op and dtype that was measured: ``<stem>-forward-bfloat16.png`` and so on.

    Peak memory goes to ``<stem>-memory-bfloat16.png``, the comparison with older ways of computing attention to
    ``<stem>-history-bfloat16.png``, the variants to ``<stem>-variants-bfloat16.png``.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    sections = ("records", "memory", "history", "variants")
    speed, memory, history, variants = (results.get(section, []) for section in sections)
    drawn = []
    for dtype in sorted({record["dtype"] for record in [*speed, *memory, *history, *variants]}):
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
        records = [record for record in history if record["dtype"] == dtype]
        if records:
            path = stem.with_name(f"{stem.name}-history-{dtype}.png")
            title = f"Plain attention, FlashAttention-1 (fa1) and 2 (wmma), {dtype}, {results['device']}"
            drawn.append(_history(records, title, path))
        records = [record for record in variants if record["dtype"] == dtype and "ratio" in record]
        if records:
            path = stem.with_name(f"{stem.name}-variants-{dtype}.png")
            title = f"Variants: share of the plain rate, {dtype}, {results['device']}"
            drawn.append(_variants(records, title, path))
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
        _memory_axis(panel)
    return _finish(figure, axes, title, path)


def _history(records: Sequence[Record], title: str, path: Path) -> Path:
    ops = [op for op in ("forward", "backward") if any(record["op"] == op for record in records)]
    figure, axes = _grid(len(ops), 2)
    for op, (time, memory) in zip(ops, axes, strict=True):
        shown = [record for record in records if record["op"] == op]
        _lines(time, shown, "ms", "ms", None, 1)
        time.set_title(f"{op}, head_dim {shown[0]['head_dim']}")
        time.set_yscale("log")
        time.set_ylabel("milliseconds")
        _lines(memory, shown, "peak_bytes", "peak_bytes", None, 1 / (1 << 20))
        memory.set_title(f"{op}, memory beyond inputs and outputs")
        _memory_axis(memory)
    return _finish(figure, axes, title, path)


def _variants(records: Sequence[Record], title: str, path: Path) -> Path:
    """A panel for each kernel and head_dim, with a bar for each op and a line for the least that is asked for."""
    from matplotlib import pyplot

    panels = sorted({(record["kernel"], record["head_dim"]) for record in records})
    ops = [op for op in ("forward", "backward") if any(record["op"] == op for record in records)]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 3.2 * len(panels)), squeeze=False)
    for (kernel, head_dim), (panel,) in zip(panels, axes, strict=True):
        shown = [record for record in records if (record["kernel"], record["head_dim"]) == (kernel, head_dim)]
        names = sorted({_variant_key(record) for record in shown})
        for number, op in enumerate(ops):
            ratios = {_variant_key(record): record["ratio"] for record in shown if record["op"] == op}
            places = [place + 0.4 * number - 0.2 for place, name in enumerate(names) if name in ratios]
            heights = [ratios[name] for name in names if name in ratios]
            panel.bar(places, heights, 0.38, label=op, color=OUR_COLORS[number])
        bars = {_variant_key(record): bar_of(record) for record in shown}
        for place, name in enumerate(names):
            if bars[name] is not None:
                panel.hlines(bars[name], place - 0.4, place + 0.4, color="black", label="least asked for")
        panel.set_xticks(range(len(names)), [f"{name}\n{seqlen}" for _, name, seqlen in names])
        panel.set_title(f"{kernel}, head_dim {head_dim}, by variant and length")
        panel.grid(alpha=0.3, axis="y")
    handles, labels = axes[0][0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.suptitle(title)
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=len(entries))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _variant_key(record: Record) -> tuple[int, str, int]:
    """Sorts as the variants are listed."""
    return ORDER.get(record["variant"], len(ORDER)), record["variant"], record["seqlen"]


def _memory_axis(panel: Any) -> None:
    panel.set_yscale("symlog", linthresh=1 / 8)
    panel.set_ylim(bottom=-1 / 16)
    panel.set_yticks(list(MEMORY_TICKS), MEMORY_TICKS.values())


def _lines(panel: Any, records: Sequence[Record], own: str, peer_key: str, peer_value: Any, factor: float) -> None:
    """A line for each kernel and for each peer that was measured."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        points.setdefault(record["kernel"], {})[record["seqlen"]] = record[own] * factor
    for seqlen in sorted({record["seqlen"] for record in records}):
        best = fastest(record for record in records if record["seqlen"] == seqlen)
        for name, peer in best.get("peers", {}).items():
            if peer_key in peer:
                points.setdefault(name, {})[seqlen] = peer_value(best, peer[peer_key]) * factor
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
