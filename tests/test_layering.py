"""Who may import whom: read off the sources, of the Python package and of the CUDA headers."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A part of the package imports from parts in lines above its own. A new part needs a place here.
PYTHON_LAYERS = [
    {"_problem", "_device"},
    {"_cublas", "_driver"},
    {"_params", "_checks", "_heads_as_rows", "_jit", "_dual"},
    {"_check_mods", "_check_options"},
    {"_dropout"},
    {"_numpy_pairs"},
    {"_numpy"},
    {"_features"},
    {"_options"},
    {"_kernel"},
    {"_call", "_tensor_maps", "_wgmma"},
    {"_sm90_block"},
    {"_dbias", "_parts", "_sm80_tiles"},
    {"_gradients"},
    {"_naive", "_sm80", "_sm90_dq", "_wmma"},
    {"_fa1"},
    {"_sm90_backward"},
    {"_sm90"},
    {"_launch"},
    {"_cupy"},
    {"_backends"},
    {"_block_mask", "_merge", "_padding"},
    {"_variants"},
    {"_plan"},
    {"_attention"},
    {"_varlen"},
    {"flash_attn"},
    {"__init__"},
    {"testing"},
    {"_cli"},
    {"__main__"},
]
MAY_IMPORT_CUPY = {"_cupy", "_cublas", "_jit", "_cli"}

# A header includes from folders above its own, and from its own: but a kernel never includes another kernel.
CUDA_LAYERS = ["common", "ptx", "tile", "attention", "kernels"]


def imported_names(source: Path, package: Path) -> Iterator[str]:
    """The full names of what a module imports, wherever in it; `from a import b` gives a.b."""
    here = ["cuflash", *source.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = here[: -node.level] if node.level else []
            origin += [node.module] if node.module else []
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def python_violations(package: Path) -> list[str]:
    """The imports that go sideways or up, and those of CuPy where it must not be."""
    level = {part: number for number, parts in enumerate(PYTHON_LAYERS) for part in parts}
    violations = []
    for source in sorted(package.rglob("*.py")):
        name = source.relative_to(package).as_posix()
        part = name.split("/")[0].removesuffix(".py")
        if part not in level:
            violations.append(f"{name}: has no place in PYTHON_LAYERS")
            continue
        for imported in imported_names(source, package):
            library, _, inner = imported.partition(".")
            if library == "cuflash":
                other = inner.split(".")[0]
                if other not in level:  # the package itself, or a name that it offers
                    other = "__init__"
                if other != part and level[other] >= level[part]:
                    violations.append(f"{name}: imports {imported}")
            elif library in {"cupy", "cupy_backends", "cupyx"} and part not in MAY_IMPORT_CUPY:
                violations.append(f"{name}: imports {imported}")
    return violations


def cuda_violations(cuda_src: Path) -> list[str]:
    """The includes that go up or from kernel to kernel, cycles of includes, and assembly outside ptx/."""
    level = {folder: number for number, folder in enumerate(CUDA_LAYERS)}
    includes: dict[str, set[str]] = {}
    violations = []
    for source in sorted((cuda_src / "cuflash").rglob("*.cuh")):
        name = source.relative_to(cuda_src).as_posix()
        folder = source.parent.name
        code = re.sub(r"//[^\n]*", "", source.read_text())
        includes[name] = set(re.findall(r'#\s*include\s*[<"](cuflash/[^>"]+)[>"]', code))
        for other in sorted(includes[name]):
            above = level[Path(other).parent.name] - level[folder]
            if above > 0 or (above == 0 and folder == "kernels"):
                violations.append(f"{name}: includes {other}")
        if folder != "ptx" and re.search(r"\b(__)?asm(__)?\b", code):
            violations.append(f"{name}: has inline assembly")
    try:
        TopologicalSorter(includes).prepare()
    except CycleError as error:
        violations.append(f"headers include each other: {' -> '.join(error.args[1])}")
    return violations


def test_python_imports_go_down() -> None:
    assert python_violations(ROOT / "cuflash") == []


def test_cuda_includes_go_down_and_assembly_is_in_ptx() -> None:
    assert cuda_violations(ROOT / "cuda_src") == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("_problem.py", "from ._params import fill"),
        ("_problem.py", "import cupy"),
        ("_problem.py", "from cuflash import attention"),
        ("_params.py", "def later():\n    from cupy.cuda import nvrtc"),
        ("_numpy.py", "from . import _backends"),
        ("_jit/sources.py", "from .. import _launch"),
        ("_jit/sources.py", "import cuflash._attention"),
        ("testing/_reference.py", "import cuflash._cli"),
        ("_unheard_of.py", "import math"),
    ],
)
def test_a_wrong_python_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    package = tmp_path / "cuflash"
    shutil.copytree(ROOT / "cuflash", package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / file).open("a") as source:
        source.write(f"\n{line}\n")
    assert {violation.split(":")[0] for violation in python_violations(package)} == {file}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("common/math.cuh", "#include <cuflash/tile/matrix.cuh>"),
        ("ptx/cp_async.cuh", '#include "cuflash/attention/softmax.cuh"'),
        ("kernels/fwd_wmma.cuh", "#include <cuflash/kernels/bwd_delta.cuh>"),
        ("common/numbers.cuh", "#include <cuflash/common/math.cuh>\n#include <cuflash/common/numbers.cuh>"),
        ("tile/matrix.cuh", '__device__ inline void fence() { asm volatile("fence.proxy.async;"); }'),
    ],
)
def test_a_wrong_cuda_include_is_found(tmp_path: Path, file: str, line: str) -> None:
    shutil.copytree(ROOT / "cuda_src", tmp_path / "cuda_src")
    with (tmp_path / "cuda_src" / "cuflash" / file).open("a") as source:
        source.write(f"\n{line}\n")
    found = cuda_violations(tmp_path / "cuda_src")
    assert found
    assert all(file in violation for violation in found)  # an include that goes up may close a cycle too
