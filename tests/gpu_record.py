"""The record of the last run of the GPU ring: which sources it tested, where, and what came out.

``python -m tests.gpu_record`` runs the GPU ring and writes tests/gpu_record.json; further arguments go to pytest.
``python -m tests.gpu_record --check`` exits with 1 unless the record is of today's sources and nothing failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from cuflash._jit.sources import sources_digest

RECORD = Path(__file__).with_name("gpu_record.json")


class _Counts:
    """A pytest plugin that counts outcomes; a test counts once, by its worst phase."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def machine() -> dict[str, str]:
    """What the run depends on besides the sources."""
    import cupy

    def version(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    runtime = cupy.cuda.runtime
    return {
        "device": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": version(runtime.driverGetVersion()),
        "cuda": version(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def run(arguments: list[str], record: Path) -> int:
    """Run the GPU ring and write its record; returns pytest's exit status."""
    import pytest

    # Of the workers of pytest-xdist: each with as many BLAS threads as there are cores, they are 3 times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    digest, counts = sources_digest(), _Counts()
    status = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *arguments], plugins=[counts])
    content = {
        "sources_digest": digest,
        **machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **vars(counts),
    }
    record.write_text(json.dumps(content, indent=2) + "\n")
    return int(status)


def check(record: Path) -> str | None:
    """What is wrong with the record, or None."""
    if not record.exists():
        return f"{record.name} does not exist: run `python -m tests.gpu_record` on a machine with a GPU"
    content = json.loads(record.read_text())
    if content["sources_digest"] != sources_digest():
        return f"{record.name} is of other sources ({content['date']}): run `python -m tests.gpu_record` on a GPU"
    if content["failed"] or not content["passed"]:
        return f"{record.name}: {content['passed']} tests passed, {content['failed']} failed"
    return None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the record with today's sources")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record is")
    options, arguments = parser.parse_known_args()
    if not options.check:
        return run(arguments, options.record)
    problem = check(options.record)
    print(problem or f"{options.record.name} is of these sources, and everything passed")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
