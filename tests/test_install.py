"""What ``make`` installs: GPU packages that fit the driver, one CuPy at most, nothing where all is there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import gpu_extra

ROOT = Path(__file__).resolve().parents[1]


class FakeDriver:
    """A libcuda that runs this version of CUDA."""

    def __init__(self, version: int, status: int = 0) -> None:
        self.version = version
        self.status = status

    def cuDriverGetVersion(self, address: ctypes._Pointer[ctypes.c_int]) -> int:  # noqa: N802
        ctypes.cast(address, ctypes.POINTER(ctypes.c_int))[0] = self.version
        return self.status


@pytest.mark.parametrize(
    ("driver", "extra"),
    [
        (FakeDriver(13020), "cuda13x"),
        (FakeDriver(13000), "cuda13x"),
        (FakeDriver(12090), "cuda12x"),
        (FakeDriver(11080), ""),
        (FakeDriver(12090, status=999), ""),
        (None, ""),
    ],
)
def test_the_gpu_packages_fit_the_driver(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None, extra: str
) -> None:
    def load(name: str) -> FakeDriver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert gpu_extra.gpu_extra() == extra


def commands(*arguments: str) -> str:
    """What make would do, were nothing done yet."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    environment = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *arguments],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        (["demo", "CUDA="], "examples"),
        (["demo", "CUDA=cuda12x"], "examples,cuda12x"),
        (["demo", "CUDA=cuda13x"], "examples,cuda13x"),
        (["test", "CUDA="], "test,cuda12x"),
        (["test", "CUDA=cuda13x"], "test,cuda13x"),
    ],
)
def test_make_installs_the_right_extras(arguments: list[str], extras: str) -> None:
    assert f'install --editable ".[{extras}]"' in commands(*arguments)


@pytest.mark.parametrize(("wanted", "other"), [("cuda12x", "cuda13x"), ("cuda13x", "cuda12x")])
def test_make_removes_the_other_cupy_first(wanted: str, other: str) -> None:
    said = commands("test", f"CUDA={wanted}")
    assert said.index(f"uninstall --yes cupy-{other}") < said.index("install --editable")
    assert f"uninstall --yes cupy-{wanted}" not in said


def test_make_installs_nothing_where_all_is_ready() -> None:
    said = commands("demo", "test", "READY=python3")
    assert "pip" not in said
    assert "python3 -m pytest" in said
    assert ".venv" not in said
