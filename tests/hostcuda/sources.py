"""The C++ of the emulation and of the kernels, and digests of what a kernel is made of."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = HERE / "hostcuda"
SHADOW = HERE / "shadow"
CUDA_SRC = HERE.parents[1] / "cuda_src"

_INCLUDE = re.compile(r"^\s*#\s*include\s*<(cuflash/[^>]+)>", re.MULTILINE)
_COMMENT = re.compile("//.*")


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@functools.cache
def emulation_digest() -> str:
    files = sorted(path for root in (RUNTIME, SHADOW) for path in root.rglob("*") if path.is_file())
    return digest([(str(path.relative_to(HERE)), path.read_bytes()) for path in files])


def closure_digest(code: str, cuda_src: Path) -> str:
    """Digest of the code and of every library header that it includes, directly or not.

    Only of those, so that a change in one kernel leaves the compiled others valid. The library writes a
    digest of all its sources into a comment of the code; comments do not count.
    """
    seen: dict[str, str] = {}
    pending = [("", _COMMENT.sub("", code))]
    while pending:
        name, text = pending.pop()
        seen[name] = text
        for header in _INCLUDE.findall(text):
            if header not in seen and (cuda_src / header).is_file():
                pending.append((header, (cuda_src / header).read_text()))
    return digest(sorted(seen.items()))
