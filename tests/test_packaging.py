"""The wheel: what is in it, and that it works where there is nothing but NumPy."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import cuflash

ROOT = Path(__file__).resolve().parents[1]


def build(target: str, directory: Path) -> Path:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = directory.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def numpy_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages that holds the wheel, NumPy, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    packages = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (site / name).symlink_to(packages / name)
    return site


def run(code: str, site: Path, directory: Path) -> str:
    """What a Python without its own site-packages prints."""
    code = f"import sys; sys.path.insert(0, {str(site)!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def source_files(*folders: str) -> set[str]:
    """The files of the tree that belong into a package, by their paths from its root."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cuh", ".typed"}
    }


def test_the_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    expected = source_files("cuflash") | {f"cuflash/{name}" for name in source_files("cuda_src")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "cuflash/py.typed" in names
    assert any(name.startswith("cuflash/cuda_src/cuflash/kernels/") for name in names)
    assert names == expected


def test_the_sdist_holds_what_builds_and_tests_it(tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert source_files("cuflash", "cuda_src") <= names
    assert {"pyproject.toml", "README.md", "Makefile", ".ci/run", "tests/test_packaging.py"} <= names
    assert not any(name.startswith((".venv", "dist", "tests/hostcuda/build/")) for name in names)


@pytest.mark.parametrize("function", [cuflash.attention, cuflash.attention_varlen])
def test_type_checkers_let_results_be_used(function: Any) -> None:
    """Of an array or a pair they would allow neither `out.shape` nor `out + x`."""
    assert get_type_hints(function)["return"] is Any


def test_versions_agree(wheel: Path) -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert wheel.name.split("-")[1] == cuflash.__version__ == newest[1]


def test_the_wheel_works_with_numpy_alone(numpy_only: Path, tmp_path: Path) -> None:
    code = """
import numpy as np, cuflash
q = np.ones((2, 3, 5, 8), np.float32)
out, vjp = cuflash.attention_vjp(q, q, q, causal=True)
print(cuflash.__file__, np.allclose(out, q), [gradient.shape == q.shape for gradient in vjp(q)])
"""
    where, *results = run(code, numpy_only, tmp_path).split(maxsplit=1)
    assert Path(where).is_relative_to(numpy_only)
    assert results == ["True [True, True, True]"]


def test_the_wheel_finds_its_cuda_sources(numpy_only: Path, tmp_path: Path) -> None:
    code = "from cuflash._jit.sources import cuda_digest, cuda_src; print(cuda_src(), cuda_digest())"
    where, digest = run(code, numpy_only, tmp_path).split()
    assert Path(where) == numpy_only / "cuflash" / "cuda_src"
    from cuflash._jit.sources import cuda_digest

    assert digest == cuda_digest()


@pytest.mark.parametrize("module", ["cuflash", "cuflash.testing"])
def test_numpy_users_import_no_cupy(module: str) -> None:
    """Here CuPy may be installed: still, no call on NumPy arrays imports it."""
    code = f"""
import sys, numpy as np, {module}, cuflash
q = np.ones((4, 8))
out, lse = cuflash.attention(q, q, q, return_lse=True)
cuflash.attention_backward(out, q, q, q, out, lse)
print([name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupy_backends", "hypothesis")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
