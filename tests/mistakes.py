"""Mistakes seeded into the kernels' source."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.hostcuda.sources import CUDA_SRC


def seed_mistake(directory: Path, file: str, old: str, new: str, *, count: int = 1) -> Path:
    """Return a copy of cuda_src in which `new` stands in the place of `old`, which is there `count` times."""
    cuda_src = directory / "cuda_src"
    shutil.copytree(CUDA_SRC, cuda_src)
    path = cuda_src / "cuflash" / file
    text = path.read_text()
    found = text.count(old)
    assert found == count, f"{old!r} is {found} times in {file}, not {count}: bring this mistake up to date"
    path.write_text(text.replace(old, new))
    return cuda_src
