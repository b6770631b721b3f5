"""Where the CUDA sources of the library are, and what identifies their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def cuda_src() -> Path:
    """The directory to put on the include path: inside an installed package, or beside it in the source tree."""
    for directory in (PACKAGE / "cuda_src", PACKAGE.parent / "cuda_src"):
        if (directory / "cuflash").is_dir():
            return directory
    raise RuntimeError(f"cuflash: its CUDA sources are missing; expected them in {PACKAGE / 'cuda_src'}")


def digest_of(files: Iterable[tuple[str, Path]]) -> str:
    """The SHA-256 over sorted names and the bytes of the files they name."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _tree(prefix: str, directory: Path, pattern: str) -> list[tuple[str, Path]]:
    return [
        (f"{prefix}/{path.relative_to(directory).as_posix()}", path)
        for path in directory.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    ]


@cache
def cuda_digest() -> str:
    """Identifies the CUDA sources: part of every kernel's text, because CuPy's cache does not see included headers."""
    return digest_of(_tree("cuda_src", cuda_src(), "*.cuh"))


def sources_digest() -> str:
    """Identifies all sources that a measurement or a GPU test run depends on."""
    python = [entry for entry in _tree("cuflash", PACKAGE, "*.py") if not entry[0].startswith("cuflash/cuda_src/")]
    return digest_of([*_tree("cuda_src", cuda_src(), "*.cuh"), *python])
