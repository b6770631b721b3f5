"""A pytest plugin for machines with several GPUs: each worker of pytest-xdist has one of them for itself."""

from __future__ import annotations

import os
from pathlib import Path

_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
if _count := len(list(Path("/dev").glob("nvidia[0-9]*"))):
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(_worker.removeprefix("gw")) % _count)
