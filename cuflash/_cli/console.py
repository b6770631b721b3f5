"""Tables and progress on the terminal: with rich where it is installed and someone looks, else plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Table:
    """A table of text, for the terminal or for Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.columns, ["-" * width for width in widths], *self.rows]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def markdown(self) -> str:
        lines = [self.columns, ["---:"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Progress(Protocol):
    """Tells how far a run has come."""

    def start(self, label: str) -> None:
        """The next step begins."""

    def note(self, text: str) -> None:
        """Something to read about the current step."""


class _PlainProgress:
    """One line a step: for logs, pipes, and where rich is not installed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = 0

    def start(self, label: str) -> None:
        self._started += 1
        print(f"[{self._started:>{len(str(self._total))}}/{self._total}] {label}", flush=True)

    def note(self, text: str) -> None:
        print(f"    {text}", flush=True)


class _RichProgress:
    """A bar with the time that is left."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)
        self._started = 0

    def start(self, label: str) -> None:
        self._bar.update(self._task, completed=self._started, description=label)
        self._started += 1

    def note(self, text: str) -> None:
        self._bar.console.print(f"{self._bar.tasks[0].description}: {text}", markup=False, highlight=False)


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """A progress bar over ``total`` steps, or a line for each."""
    rich = _rich()
    if rich is None:
        yield _PlainProgress(total)
        return
    columns = [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    ]
    with rich.progress.Progress(*columns, transient=True) as bar:
        yield _RichProgress(bar, total)


def show(table: Table) -> None:
    """Print a table."""
    rich = _rich()
    if rich is None:
        print(f"\n{table.title}\n{table.plain()}")
        return
    drawn = rich.table.Table(title=table.title, title_justify="left", header_style="bold")
    for column in table.columns:
        drawn.add_column(rich.text.Text(column), justify="right")
    for row in table.rows:
        drawn.add_row(*map(rich.text.Text, row))
    rich.console.Console().print(drawn)


def _rich() -> Any:
    """The rich package, or None where it is missing or nobody is looking."""
    if not sys.stdout.isatty():
        return None
    try:
        import rich
        import rich.console
        import rich.progress
        import rich.table
        import rich.text
    except ImportError:
        return None
    return rich
