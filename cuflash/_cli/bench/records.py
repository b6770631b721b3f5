"""The results file, ``bench/results/<device>.json``: its schema, and how a new run is merged into it.

``{"device", "driver", "cuda", "cupy", "date", "sources_digest", "records": [...]}``, and the sections
"memory", "host", "compile", "history" and "variants" beside "records". The head of the file tells of the last run.
Every record also carries the date and the digest of the sources it was measured with: runs of different sources may
meet here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Results = dict[str, Any]

HEAD = ("device", "driver", "cuda", "cupy", "date", "sources_digest")
SECTIONS = ("records", "memory", "host", "compile", "history", "variants")
IDENTITY = (
    "op", "kernel", "dtype", "head_dim", "causal", "seqlen", "batch", "heads", "heads_kv", "variant",
)  # fmt: skip


def identity(record: Record) -> tuple[Any, ...]:
    """What a record is about: a new record replaces the one with the same identity."""
    return tuple(record.get(field) for field in IDENTITY)


def merge(results: Results, head: Record, measured: dict[str, list[Record]]) -> Results:
    """The results with a run merged in: its head, and its records instead of older ones of equal identity."""
    stamp = {key: head[key] for key in ("date", "sources_digest")}
    merged: Results = {**results, **head, "records": results.get("records", [])}
    for section, records in measured.items():
        by_identity = {identity(record): record for record in results.get(section, [])}
        by_identity |= {identity(record): {**record, **stamp} for record in records}
        merged[section] = sorted(by_identity.values(), key=_order)
    return merged


def fastest(cell: Iterable[Record]) -> Record:
    """Of our kernels on one cell; what its peers did is what its record says."""
    return max(cell, key=lambda record: float(record.get("tflops", 0)))


def load(path: Path) -> Results:
    """The results in a file; none when there is no such file yet."""
    if not path.exists():
        return {}
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def save(path: Path, results: Results) -> None:
    """Write one record a line, so that a diff shows what was measured anew; never leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.draft")
    draft.write_text(_dump(results), encoding="utf-8")
    draft.replace(path)


def file_name(device: str) -> str:
    """The name of a device as a file name: "NVIDIA H200" gives "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def digests(results: Results) -> set[str]:
    """The digests of the sources that the records were measured with."""
    return {record["sources_digest"] for section in SECTIONS for record in results.get(section, [])}


def _order(record: Record) -> tuple[Any, ...]:
    return tuple((value is not None, value) for value in identity(record))


def _dump(results: Results) -> str:
    entries = [f"  {json.dumps(key)}: {_dump_value(value)}" for key, value in results.items()]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _dump_value(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(_lines(value)) + "\n  ]"
    return json.dumps(value)


def _lines(records: Iterable[Record]) -> list[str]:
    return [f"    {json.dumps(record)}" for record in records]
