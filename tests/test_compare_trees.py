"""``tools/compare_trees.py``: each tree runs its own sources, and differences of results show."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TWICE = """
_attention = attention


def attention(*args, **options):
    return 2 * _attention(*args, **options)
"""


def test_trees_are_measured_side_by_side(tmp_path: Path) -> None:
    for name in ("cuflash", "cuda_src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with (tmp_path / "cuflash" / "__init__.py").open("a") as package:
        package.write(TWICE)
    small = ["--cpu", "--op", "forward", "--head-dim", "16", "--seqlen", "32", "--variant", "plain", "softcap"]
    command = [sys.executable, str(ROOT / "tools" / "compare_trees.py"), str(ROOT), str(ROOT), str(tmp_path), *small]

    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert out.startswith(f"TFLOP/s by {ROOT}, {ROOT}, {tmp_path}\n")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["plain", "softcap"]
    assert all(float(row[-1]) == 1.0 for row in rows)  # twice the result is as far away as the result is large
    assert len(rows[0][12:]) == 4  # behind the cell three rates, and the distance
