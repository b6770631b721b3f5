"""The documents: their numbers are right, and the files and commands they name exist."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _checks, _sm90, _sm90_backward, _sm90_block, _sm90_dq
from cuflash._device import Chip
from cuflash._launch import FAMILIES, LaunchBackend
from cuflash._options import PLAIN, Options
from cuflash._problem import Operand, Problem
from tests.conftest import Ring
from tests.hostcuda import HostDevice

ROOT = Path(__file__).resolve().parents[1]
ALGORITHM = (ROOT / "docs" / "algorithm.md").read_text()
README = (ROOT / "README.md").read_text()
VARIANTS = (ROOT / "docs" / "variants.md").read_text()
KERNELS = (ROOT / "docs" / "kernels.md").read_text()
FOR_CUPY = "# CuPy\n"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def table(text: str, *header: str) -> list[dict[str, str]]:
    """The rows of the Markdown table that has this header."""
    start = text.index(f"| {' | '.join(header)} |")
    lines = text[start : text.index("\n\n", start)].splitlines()[2:]
    return [dict(zip(header, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]


def numbers(cell: str) -> np.ndarray:
    return np.array([float(number) for number in cell.split(",")])


def assert_printed(printed: str, value: float) -> None:
    """A number as printed is the value rounded to the digits that are shown."""
    decimals = len(printed.partition(".")[2])
    assert printed == f"{value:.{decimals}f}"


def check_online_softmax(text: str) -> None:
    largest, total, weighted = -np.inf, 0.0, 0.0
    rows = table(text, "piece", "scores", "values", "m", "factor", "l", "o")
    for row in rows:
        scores, values = numbers(row["scores"]), numbers(row["values"])
        old, largest = largest, max(largest, scores.max())
        factor = np.exp(old - largest)
        total = factor * total + np.exp(scores - largest).sum()
        weighted = factor * weighted + np.exp(scores - largest) @ values
        for name, value in (("m", largest), ("factor", factor), ("l", total), ("o", weighted)):
            assert_printed(row[name], value)

    scores, values = (np.concatenate([numbers(row[name]) for row in rows])[:, None] for name in ("scores", "values"))
    out, lse = cuflash.attention(np.ones((1, 1)), scores, values, scale=1, return_lse=True)
    for name, exact, online in (
        ("o / l", out.item(), weighted / total),
        ("lse", lse.item(), largest + np.log(total)),
    ):
        assert exact == pytest.approx(online, rel=1e-12)
        printed = re.search(rf"`{name} = (.+?)`", text)
        assert printed is not None
        assert_printed(printed[1], exact)


def check_backward(text: str) -> None:
    rows = table(text, "key", "score", "value", "P", "dP", "dS")
    scores, values = (np.array([[float(row[name])] for row in rows]) for name in ("score", "value"))
    weights = np.exp(scores) / np.exp(scores).sum()
    _, vjp = cuflash.attention_vjp(np.ones((1, 1)), scores, values, scale=1)
    _, dscores, dvalues = vjp(np.ones((1, 1)))  # with a query of 1, the score of a key is the key
    for row, weight, value, dscore, dvalue in zip(rows, weights, values, dscores, dvalues, strict=True):
        assert weight == pytest.approx(dvalue, rel=1e-12)
        for name, number in (("P", weight), ("dP", value), ("dS", dscore)):
            assert_printed(row[name], number.item())


def check_memory(text: str) -> None:
    for row in table(text, "N", "S in MiB", "lse in MiB"):
        seqlen = int(row["N"])
        assert float(row["S in MiB"]) == 8 * seqlen**2 * 2 / 2**20
        assert float(row["lse in MiB"]) == 8 * seqlen * 4 / 2**20


def check_traffic(text: str) -> None:
    for row in table(text, "N", "D", "plain", "tiles"):
        seqlen, dim = int(row["N"]), int(row["D"])
        assert_printed(row["plain"], (4 * seqlen * dim + 4 * seqlen**2) / 1e6)
        assert_printed(row["tiles"], (2 * seqlen * dim + 2 * seqlen * dim * seqlen / 128) / 1e6)


CHECKS = [check_online_softmax, check_backward, check_memory, check_traffic]


@pytest.mark.parametrize("check", CHECKS)
def test_the_numbers_are_right(check) -> None:
    check(ALGORITHM)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (check_online_softmax, "21.3534", "21.3535"),
        (check_online_softmax, "1, 3 |", "1, 2 |"),
        (check_online_softmax, "lse = 5.1852", "lse = 5.1853"),
        (check_backward, "-0.2847", "0.2847"),
        (check_memory, "65536 | 65536", "65536 | 32768"),
        (check_traffic, "541.1", "541.0"),
    ],
)
def test_a_wrong_number_is_found(check, right: str, wrong: str) -> None:
    assert right in ALGORITHM
    with pytest.raises(AssertionError):
        check(ALGORITHM.replace(right, wrong))


def tiles_with(array: str) -> set[tuple[tuple[int, ...], int]]:
    """Tiles of sm90's gradients of K and V, without the places for pairs, and their KiB beside an array of pairs."""
    problem = Problem("bfloat16", 1, 1, 1, 128, 128, 64, 64, 1.0)
    dtype = {"mask": "bool", "bias": problem.dtype}.get(array, "")
    options = Options.of(problem, {array: Operand((1, 1, 128, 128), (0, 0, 128, 1), dtype)}) if dtype else PLAIN
    return {
        (tile[:4], kib(_sm90_backward._shared_bytes(dims, tile, options, _sm90_backward._adds_dq(dims, False))))
        for dims, tiles in _sm90_backward.TILES.items()
        for tile in tiles
    }


def kib(size: int) -> int:
    return int(size / 1024 + 0.5)


def check_tiles(text: str) -> None:
    """The tables have tiles that there are, and what they take of the shared memory."""
    forward = {
        (tile[:5], kib(_sm90_block.shared_bytes(dims, tile, PLAIN)))
        for dims, tiles in _sm90.TILES.items()
        for tile in tiles
    }
    dq = {
        (tile[:5], kib(_sm90_dq._shared_bytes(dims, tile, PLAIN)))
        for dims, tiles in _sm90_dq.TILES.items()
        for tile in tiles
    }
    of_backward = "dK and dV", "S and dP", "P and dS, rounded", "dQ", "places for K and V, Q and dO"
    headers = {
        ("head dimensions", "rows x keys", "places for Q, K, V", "KiB", "registers", "why"): lambda _: forward,
        ("head dimension", "queries x keys", *of_backward, "KiB"): lambda dims: tiles_with(dims.split()[-1]),
        ("head dimension", "queries x keys", "places for Q and dO, V, K", "KiB", "registers of 232"): lambda _: dq,
    }
    for header, tiles_of in headers.items():
        (places,) = (name for name in header if name.startswith("places"))
        for row in table(text, *header):
            shape = [int(size) for size in row[header[1]].split(" x ")]
            numbers, sizes = (re.findall(r"[\d, ]*\d", row[name]) for name in (places, "KiB"))
            for counts, size in zip(numbers, sizes, strict=True):  # in brackets those of other head dimensions
                assert ((*shape, *map(int, counts.split(", "))), int(size)) in tiles_of(row[header[0]])


def test_the_tiles_are_those_of_the_kernels() -> None:
    check_tiles(KERNELS)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("161 (168)", "161 (176)"), ("192 x 128 | 2, 4, 4", "192 x 112 | 2, 4, 4"), ("| 198 |", "| 199 |")],
)
def test_a_wrong_tile_is_found(right: str, wrong: str) -> None:
    assert right in KERNELS
    with pytest.raises(AssertionError):
        check_tiles(KERNELS.replace(right, wrong))


def test_every_kernel_is_listed() -> None:
    listing = KERNELS[KERNELS.index("\n## The wmma family") :]
    sources = sorted((ROOT / "cuda_src" / "cuflash" / "kernels").glob("*.cuh"))
    assert [path.name for path in sources if f"`{path.name}`" not in listing] == []


def test_all_lists_of_families_are_the_same() -> None:
    names = ("auto", *FAMILIES)
    assert names == _checks.KERNELS
    listed = ", ".join(f'"{name}"' for name in names)
    assert f"kernel : {{{listed}}}" in str(cuflash.attention.__doc__)
    assert re.findall(r'^\| "(\w+)" \|', README, re.MULTILINE) == list(FAMILIES)


def named_files(text: str) -> set[str]:
    """What stands in backticks and looks like a file of the project, and what links point to."""
    quoted = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cuh|h|md|toml|tsv)|[A-Z]\w+\.md|pyproject\.toml)`", text)
    return {*quoted, *(link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_named_exist(document: Path) -> None:
    missing = {
        name
        for name in named_files(document.read_text())
        if not (ROOT / name).exists() and not (document.parent / name).exists()
    }
    assert missing == set()


def test_a_missing_file_is_found() -> None:
    assert named_files("See `cuflash/_no.py`, [this](docs/no.md) and https://example.org/a.md.") == {
        "cuflash/_no.py",
        "docs/no.md",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_make_targets_named_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", document.read_text())) <= targets


def modules_with_examples() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "cuflash").rglob("*.py"))
        if ">>>" in path.read_text()
    ]


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def python_block(text: str, part: str) -> str:
    """The Python block of the document that contains this."""
    (block,) = [block for block in python_blocks(text) if part in block]
    return block


def run_block(block: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The block runs in these names, and prints what the comments behind its prints say."""
    exec(compile(block, "document", "exec"), names)
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.+)", block, re.MULTILINE)


def check_quickstart(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = python_block(text, "rng =")
    assert "print(" in block
    run_block(block, {}, capsys)


def test_the_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    check_quickstart(README, capsys)


def test_a_wrong_quickstart_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert "# (2, 8, 1000, 64)" in README
    with pytest.raises(AssertionError):
        check_quickstart(README.replace("# (2, 8, 1000, 64)", "# (2, 8, 1000, 65)"), capsys)


def sections(text: str) -> list[str]:
    """The sections of a document that have Python blocks, each from its heading on; not what comes before them."""
    return [section for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:] if python_blocks(section)]


def run_callables(section: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the blocks of a section that are for NumPy arrays, on the CPU, and return the names that they define."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "numpy_backend", _backends.NumpyBackend())
        for block in [python_blocks(VARIANTS)[0], *python_blocks(section)]:
            if not block.startswith(FOR_CUPY):
                run_block(block, names, capsys)
    return names


def check_expressions(section: str, ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    """What the expressions of a section compute is what its callables compute."""
    names = run_callables(section, capsys)
    expected = names.pop("out")
    names = {name: ring.asarray(x) if isinstance(x, np.ndarray) else x for name, x in names.items()}
    (block,) = [block for block in python_blocks(section) if block.startswith(FOR_CUPY)]
    run_block(block, names, capsys)
    np.testing.assert_allclose(ring.numpy(names["out"]), expected, atol=1e-5)


@pytest.mark.parametrize("section", sections(VARIANTS), ids=lambda section: section.partition("\n")[0])
def test_the_examples_of_the_variants_run(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_callables(section, capsys)


PROGRAMMED = [section for section in sections(VARIANTS) if FOR_CUPY in section]


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("section", PROGRAMMED, ids=lambda section: section.partition("\n")[0])
def test_expressions_compute_what_callables_do(section: str, ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    if ring.name == "numpy":
        pytest.skip("expressions are for kernels; the callables run above")
    check_expressions(section, ring, capsys)


@pytest.mark.thorough_on_wmma
def test_a_wrong_expression_is_found(ring: Ring, capsys: pytest.CaptureFixture[str]) -> None:
    if ring.name == "numpy":
        pytest.skip("expressions are for kernels")
    (section,) = [section for section in PROGRAMMED if "kv_idx < prefix(b)" in section]
    with pytest.raises(AssertionError):
        check_expressions(section.replace("kv_idx < prefix(b)", "kv_idx <= prefix(b)"), ring, capsys)


# How the table of the variants spells the keywords of a row, and an argument for each.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "`causal`, `window_size`": {"causal": True, "window_size": (3, 3)},
    "`softcap`": {"softcap": 1.0},
    "`bias`": {"bias": np.zeros((2, 2), np.float32)},
    "`alibi_slopes`": {"alibi_slopes": np.zeros(1, np.float32)},
    "`score_mod`": {"score_mod": "score"},
    "`mask`": {"mask": np.ones((2, 2), bool)},
    "`mask_mod`": {"mask_mod": "true"},
    "`block_mask`": {"block_mask": cuflash.BlockMask.from_blocks(np.ones((1, 1), bool), shape=(2, 2))},
    "`sinks`": {"sinks": np.zeros(1, np.float32)},
    "`dropout_p`": {"dropout_p": 0.5, "seed": 0},
    "`seqused_k`": {"seqused_k": np.ones(1, np.int32)},
}


class Planner(LaunchBackend):
    """Chooses a kernel for a GPU that has all families, and computes nothing."""

    def __init__(self) -> None:
        super().__init__(HostDevice(Chip("Hopper", (9, 0), 227 * 1024)))

    def plan_forward(self, problem: Problem, kernel_name: str, operands: dict[str, Operand]) -> Any:
        self.family_name(self._call(problem, operands), kernel_name)
        return lambda *arrays, **extras: None


def works(function: Any, kernel: str, options: dict[str, Any]) -> bool:
    """Whether a function takes the options and the kernel computes them."""
    arrays = [np.zeros((2, 1, 8), np.float16)] * 3
    layout: dict[str, Any] = {"layout": "bshd"}
    if function is cuflash.attention_varlen:
        arrays += [np.array([0, 2], np.int32)] * 2
        layout = {}
    if not options.keys() <= inspect.signature(function).parameters.keys():
        return False
    try:
        function(*arrays, kernel=kernel, **layout, **options)
    except NotImplementedError:
        return False
    return True


def works_on_numpy(function: Any, options: dict[str, Any]) -> bool:
    """The same for NumPy's own backend, which takes callables in place of expressions."""
    callables = {"score_mod": lambda score, *place: score, "mask_mod": lambda score, b, h, q_idx, kv_idx: kv_idx >= 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "numpy_backend", _backends.NumpyBackend())
        return works(function, "auto", {name: callables.get(name, value) for name, value in options.items()})


def check_what_works(text: str) -> None:
    rows = table(text, "option", "`attention`", "`attention_varlen`", "NumPy", *FAMILIES)
    assert [row["option"] for row in rows] == list(ARGUMENTS)
    for row in rows:
        options = ARGUMENTS[row["option"]]
        both = cuflash.attention, cuflash.attention_varlen
        functions = [function for function in both if works(function, "wmma", options)]
        assert row == {
            "option": row["option"],
            "`attention`": "yes" if cuflash.attention in functions else "",
            "`attention_varlen`": "yes" if cuflash.attention_varlen in functions else "",
            "NumPy": "yes" if all(works_on_numpy(function, options) for function in functions) else "",
            **{name: "yes" if works(functions[0], name, options) else "" for name in FAMILIES},
        }


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "numpy_backend", Planner())


@pytest.mark.usefixtures("planner")
def test_the_table_of_what_works_is_right_and_complete() -> None:
    parameters = {
        **inspect.signature(cuflash.attention).parameters,
        **inspect.signature(cuflash.attention_varlen).parameters,
    }
    general = {"scale", "layout", "out", "return_lse", "kernel", "seed", "mod_args"}
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert {name for row in ARGUMENTS for name in re.findall(r"\w+", row)} == keywords - general
    check_what_works(VARIANTS)


@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize("row", ["`bias` | yes | ", "`mask_mod` | yes | yes | yes | yes | yes | "])
def test_a_wrong_row_of_what_works_is_found(row: str) -> None:
    assert row in VARIANTS
    with pytest.raises(AssertionError):
        check_what_works(VARIANTS.replace(row, f"{row}yes"))


def right(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return cuflash.attention(q, k, v, return_lse=True, **options)


def blind_to_the_mask(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return cuflash.attention(q, k, v, return_lse=True, **options | {"causal": False})


@pytest.mark.parametrize("my_attention", [right, blind_to_the_mask])
def test_the_test_of_ones_own_kernel_runs_and_finds_a_bug(my_attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    my_project = ModuleType("my_project")
    my_project.my_attention = my_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_project", my_project)
    names: dict[str, Any] = {}
    # Not as "README.md": hypothesis would read the source of the test in some lines of that file, and draw by them.
    exec(compile(python_block(README, "my_project"), "document", "exec"), names)
    settings = hypothesis.settings(max_examples=50, derandomize=True, database=None, deadline=None)
    test = settings(names["test_my_attention"])
    if my_attention is right:
        test()
    else:
        with pytest.raises(AssertionError, match="is not accurate"):
            test()
