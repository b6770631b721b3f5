"""``python -m cuflash``: info and bench, as far as they need no GPU."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _sm80_tiles, _sm90
from cuflash._cli import console, families, info, tune
from cuflash._cli.bench import ahead, cells, command, first_call, naive, plots, records, sweeps, tables, variants
from cuflash._cli.bench.cells import Cell
from cuflash._cli.bench.cpu import Cpu
from cuflash._cli.bench.machine import dtype_named
from cuflash._cli.bench.timing import Contender, Spread, describe, measure_in_turn
from cuflash._cli.main import main
from cuflash._device import Chip
from cuflash._launch import AUTO, LaunchBackend
from cuflash._problem import Problem

ROOT = Path(__file__).resolve().parents[1]
CELL = Cell(64, False, 4096, batch=4, heads=32, dtype="bfloat16")
HEAD = {
    "device": "NVIDIA Test 1",
    "driver": "580.1",
    "cuda": "13.0",
    "cupy": "14.2.0",
    "date": "2026-11-21T10:00:00+00:00",
    "sources_digest": "ab" * 32,
}


def record(op="forward", kernel="wmma", cell=CELL, ms=2.0, **peers):
    tflops = cells.flops(op, cell) / ms / 1e9
    return {"op": op, "kernel": kernel, **cell.fields, "ms": ms, "tflops": tflops, "peers": peers}


def variant_records(kernel="wmma"):
    """Every variant twice as slow as plain attention; packed sequences three times as fast as padded ones."""
    return [
        {
            **record(op, kernel, cell, plain={"ms": 1.0}, **({"padded": {"ms": 6.0}} if variant.packed else {})),
            "tflops": cells.flops(op, cell, variant.pairs(cell)) / 2.0 / 1e9,
            "variant": variant.name,
            "pairs": int(variant.pairs(cell)),
            "ratio": 0.5,
            **({"padding": 0.5} if variant.packed else {}),
        }
        for variant in variants.VARIANTS
        for cell in variant.cells(variants.SIZES["gpu"], "bfloat16")
        for op in variant.ops
    ]


@pytest.fixture
def results():
    memory = [
        {
            "op": op,
            "kernel": "wmma",
            **cell.fields,
            "peak_bytes": 32 * cell.seqlen,
            "peers": {
                "naive": {"error": "OutOfMemoryError: 12 bytes"} if cell.seqlen > 4096 else {"peak_bytes": 3 << 30}
            },
        }
        for cell in cells.memory_cells("gpu", "bfloat16")
        for op in cells.OPS
    ]
    small = cells.small_cell("bfloat16").fields
    host = {"op": "forward", "kernel": "wmma", **small, "us": 12.34, "peers": {"torch-flash": {"us": 14.6}}}
    compiled = {"num_kernels": 3, "cold_s": 3.3, "warm_s": 0.12}
    measured = {
        "records": [
            record(
                op,
                cell=cell,
                naive={"ms": 10.0},
                **{"torch-flash": {"ms": 1.0}, "torch-cudnn": {"error": "no"}},
            )
            for cell in cells.timed_cells("cells", "gpu", "bfloat16")
            for op in cells.OPS
        ],
        "memory": memory,
        "host": [host],
        "compile": [{"op": "backward", "kernel": "wmma", **small, **compiled}],
        "history": [
            {"op": op, "kernel": kernel, **cell.fields, "ms": 1.5, "tflops": 2.5, "peak_bytes": 1 << 20}
            for cell in cells.history_cells("bfloat16")
            for op in cells.OPS
            for kernel in cells.HISTORY[op]
        ],
        "variants": variant_records(),
    }
    return records.merge({}, HEAD, measured)


class TestCells:
    def test_the_36_cells(self):
        swept = cells.timed_cells("cells", "gpu", "bfloat16")
        assert len(set(swept)) == 36
        assert {cell.batch * cell.seqlen for cell in swept} == {16384}
        assert {cell.heads * cell.head_dim for cell in swept} == {2048}
        assert {cell.seqlen for cell in swept} == {512, 1024, 2048, 4096, 8192, 16384}
        assert {(cell.head_dim, cell.causal) for cell in swept} == {
            (d, c) for d in (64, 128, 256) for c in (False, True)
        }

    def test_flops_count_the_products(self):
        cell = Cell(8, False, 16, batch=2, heads=3, dtype="float32")
        one_product = 2 * 16 * 16 * 8  # a multiplication and an addition each
        assert cells.flops("forward", cell) == 2 * one_product * 6
        assert cells.flops("backward", cell) == 5 * one_product * 6

    def test_a_causal_mask_halves_the_flops(self):
        causal = Cell(8, True, 16, batch=2, heads=3, dtype="float32")
        full = Cell(8, False, 16, batch=2, heads=3, dtype="float32")
        for op in cells.OPS:
            assert 2 * cells.flops(op, causal) == cells.flops(op, full)

    def test_memory_goes_from_1k_to_128k(self):
        swept = cells.memory_cells("gpu", "bfloat16")
        assert [cell.seqlen for cell in swept] == [1024 * 2**n for n in range(8)]


class TestTiming:
    def test_spread_is_median_and_quartiles(self):
        spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
        assert spread == Spread(3.0, 2.0, 4.0)
        assert (spread * 1e3).fields("us") == {"us": 3000.0, "us_quartiles": [2000.0, 4000.0]}

    def test_contenders_take_turns(self):
        turns = []

        def sample(call, repeats):
            turns.append(call())
            return [1.0] * repeats

        contenders = {name: Contender(lambda name=name: name) for name in "ab"}
        measure_in_turn(contenders, sample, rounds=3)
        assert turns == ["a", "b"] * 4  # a warm-up and three rounds

    def test_the_warm_up_does_not_count(self):
        times = iter([100.0, 100.0, 2.0, 2.0])
        measured = measure_in_turn(
            {"a": Contender(lambda: None)}, lambda _, n: [next(times) for _ in range(n)], rounds=2
        )
        assert measured["a"] == Spread(2.0, 2.0, 2.0)

    def test_a_turn_lasts_about_as_long_as_it_may(self):
        repeats = []

        def sample(_, n):
            repeats.append(n)
            return [8.0] * n

        measure_in_turn({"a": Contender(lambda: None)}, sample, rounds=1, round_ms=40)
        assert repeats == [2, 5]

    def test_who_fails_is_told_and_the_others_go_on(self):
        def broken():
            raise MemoryError("too much\nmore about it")

        def sample(call, repeats):
            call()
            return [1.0] * repeats

        measured = measure_in_turn({"bad": Contender(broken), "good": Contender(lambda: None)}, sample)
        assert measured["bad"] == "MemoryError: too much"
        assert measured["good"].median == 1.0

    def test_a_turn_runs_in_the_contenders_context(self):
        inside = []

        @contextmanager
        def context():
            inside.append(True)
            yield
            inside.clear()

        def call():
            assert inside

        def sample(call, repeats):
            call()
            return [1.0] * repeats

        measured = measure_in_turn({"a": Contender(call, context)}, sample)
        assert measured["a"].median == 1.0
        assert not inside

    def test_errors_without_a_message(self):
        assert describe(KeyError()) == "KeyError"


class TestRecords:
    def test_a_new_measurement_replaces_the_old_one_and_only_that(self):
        other = Cell(128, True, 512, batch=1, heads=8, dtype="float16")
        old = records.merge({}, HEAD, {"records": [record(ms=2.0), record(cell=other, ms=3.0)]})
        head = {**HEAD, "sources_digest": "cd" * 32, "date": "2026-12-01T00:00:00+00:00"}
        new = records.merge(old, head, {"records": [record(ms=1.0)]})
        by_ms = {entry["ms"]: entry["sources_digest"] for entry in new["records"]}
        assert by_ms == {1.0: "cd" * 32, 3.0: "ab" * 32}
        assert new["sources_digest"] == "cd" * 32
        assert records.digests(new) == {"ab" * 32, "cd" * 32}

    @pytest.mark.parametrize(
        "change",
        [{"op": "backward"}, {"kernel": "sm90"}, {"dtype": "float16"}, {"causal": True}, {"variant": "gqa8"}],
        ids=lambda change: next(iter(change)),
    )
    def test_what_makes_another_record(self, change):
        merged = records.merge({}, HEAD, {"records": [record(), {**record(), **change}]})
        assert len(merged["records"]) == 2

    def test_other_sections_are_kept(self, results):
        merged = records.merge(results, HEAD, {"records": [record(ms=1.0)]})
        for section in ("memory", "host", "compile"):
            assert merged[section] == results[section]

    def test_a_file_says_what_was_saved(self, results, tmp_path):
        path = tmp_path / "deep" / "device.json"
        records.save(path, results)
        assert records.load(path) == results
        assert sum(line.startswith('    {"op"') for line in path.read_text().splitlines()) == 72 + 16 + 2 + 5 * 7 + 68
        assert [file.name for file in path.parent.iterdir()] == ["device.json"]

    def test_no_file_is_no_results(self, tmp_path):
        assert records.load(tmp_path / "none.json") == {}

    def test_file_names(self):
        assert records.file_name("NVIDIA H200") == "nvidia-h200.json"
        assert records.file_name("AMD EPYC (2 cores)") == "amd-epyc-2-cores.json"

    def test_the_files_of_the_project_obey_the_schema(self):
        for path in (ROOT / "bench/results").glob("*.json"):
            check_schema(records.load(path))
            assert path.name == records.file_name(records.load(path)["device"])


def check_schema(results):
    assert set(records.HEAD) <= set(results)
    assert isinstance(results["records"], list)
    for section in records.SECTIONS:
        for entry in results.get(section, []):
            assert {*records.IDENTITY[:-1], "date", "sources_digest"} <= set(entry)
            assert entry["op"] in cells.OPS
    for entry in results["records"]:
        cell = Cell(**{name: entry[name] for name in ("head_dim", "causal", "seqlen", "batch", "heads", "dtype")})
        assert math.isclose(entry["tflops"], cells.flops(entry["op"], cell) / entry["ms"] / 1e9, rel_tol=1e-3)
        for peer in entry.get("peers", {}).values():
            assert ("ms" in peer) != ("error" in peer)
    for entry in results.get("variants", []):
        forward = 4 * entry["pairs"] * entry["head_dim"] / entry["ms"] / 1e9
        assert math.isclose(entry["tflops"], forward * (1 if entry["op"] == "forward" else 2.5), rel_tol=1e-3)
        plain = entry["peers"]["plain"]
        if "ms" in plain:
            cell = Cell(**{name: entry[name] for name in ("head_dim", "causal", "seqlen", "batch", "heads", "dtype")})
            flops = cells.flops(entry["op"], cell, plain.get("pairs"))
            assert math.isclose(plain["tflops"], flops / plain["ms"] / 1e9, rel_tol=1e-3)
            assert math.isclose(entry["ratio"], entry["tflops"] / plain["tflops"], abs_tol=1e-2)


class TestTables:
    def test_speed(self, results):
        table = tables.speed(results, "forward")
        assert len(table.rows) == 36
        row = dict(zip(table.columns, table.rows[0], strict=True))
        expected = cells.flops("forward", cells.timed_cells("cells", "gpu", "bfloat16")[0]) / 2.0 / 1e9
        assert float(row["wmma"]) == pytest.approx(expected, rel=0.01)
        assert float(row["torch-flash"]) == pytest.approx(2 * expected, rel=0.01)
        assert (row["× torch-flash"], row["× naive"]) == ("0.50", "5.00")
        assert "torch-cudnn" not in row  # it has never worked

    def test_the_summary_has_one_length(self, results):
        rows = tables.summary(results).rows
        assert len(rows) == 12
        assert {row[4] for row in rows} == {"4096"}

    def test_two_kernels_stand_side_by_side(self):
        merged = records.merge(
            {}, HEAD, {"records": [record(ms=2.0), record(kernel="sm90", ms=1.0, naive={"ms": 4.0})]}
        )
        table = tables.speed(merged, "forward")
        (row,) = (dict(zip(table.columns, cells_, strict=True)) for cells_ in table.rows)
        assert float(row["sm90"]) == pytest.approx(2 * float(row["wmma"]), rel=0.01)
        assert row["× naive"] == "4.00"

    def test_peers_are_those_beside_the_fastest_kernel(self):
        """Another kernel's record may be of a run on another machine."""
        of_one_run, of_another = record(ms=2.0, naive={"ms": 9.0}), record(kernel="sm90", ms=1.0, naive={"ms": 4.0})
        for merged in ([of_one_run, of_another], [of_another, of_one_run]):
            (row,) = tables.speed(records.merge({}, HEAD, {"records": merged}), "forward").rows
            assert row[-1] == "4.00"

    def test_memory_tells_who_ran_out_of_it(self, results):
        rows = {(row[0], row[4]): row[-2:] for row in tables.memory(results).rows}
        assert list(rows["forward", "1024"]) == ["32 KiB", "3.0 GiB"]
        assert list(rows["backward", "131072"]) == ["4.0 MiB", "out of memory"]

    def test_variants_by_op(self, results):
        table = tables.variants(results)
        names = [row[0] for row in table.rows]
        assert len(names) == 2 * 18 + 1
        assert list(dict.fromkeys(names)) == list(dict.fromkeys(variant.name for variant in variants.VARIANTS))
        rows = {(row[0], row[2], row[3]): row[4:] for row in table.rows}
        _, _, backward, share, bar = rows["dbias", "64", "4096"]
        assert list(rows["dbias", "64", "4096"][:2]) == ["", ""]  # it has no forward pass of its own
        assert (share, bar) == ("0.50", "0.60")
        cell = Cell(64, False, 4096, batch=4, heads=32, dtype="bfloat16")
        assert float(backward) == pytest.approx(cells.flops("backward", cell) / 2e9, rel=0.01)
        assert rows["sinks", "64", "4096"][-1] == ""
        assert ("mask_mod", "128", "8192") in rows

    def test_the_short_table_of_variants(self, results):
        rows = {(row[0], row[2]): list(row[3:]) for row in tables.ratios(results).rows}
        assert len(rows) == 19
        assert rows["window", "16384"] == ["0.50", "0.50", "0.85"]
        assert rows["mask_mod", "8192"] == ["0.50", "0.50", "0.80"]

    def test_packed_beside_padded(self, results):
        rows = tables.padding(results).rows
        assert [row[0] for row in rows] == ["backward", "backward", "forward", "forward"]
        assert {tuple(row[-3:]) for row in rows} == {("50 %", "3.00", "1.80")}

    def test_the_first_call_with_options_is_told_apart(self, results):
        (plain,) = results["compile"]
        merged = records.merge(results, HEAD, {"compile": [{**plain, "variant": "softcap"}]})
        assert [row[4] for row in tables.compilation(merged).rows] == ["plain", "softcap"]

    def test_slow_machines_get_a_smaller_unit(self):
        merged = records.merge({}, HEAD, {"records": [record(ms=1e6)]})
        assert tables.speed(merged, "forward").title == "Forward, GFLOP/s"

    def test_every_block_can_be_made(self, results):
        for name in tables.NAMES:
            assert tables.block(results, name) != tables.NOT_MEASURED
            assert tables.block({}, name) == tables.NOT_MEASURED

    def test_filling_a_document(self, results):
        end = "<!-- /bench -->"
        text = f"before\n<!-- bench:host -->\nold\n{end}\nbetween\n<!-- bench:device@x -->\n{end}\nafter"
        asked = []

        def results_of(device):
            asked.append(device)
            return results

        filled = tables.fill(text, results_of)
        assert asked == [None, "x"]
        assert "old" not in filled
        assert "| 12.3 | 14.6 |" in filled
        assert "NVIDIA Test 1, driver 580.1" in filled
        assert [line for line in filled.splitlines() if line in ("before", "between", "after")] == [
            "before",
            "between",
            "after",
        ]
        assert tables.fill(filled, results_of) == filled

    def test_a_block_that_does_not_exist(self):
        with pytest.raises(ValueError, match="bench:nonsense: there is no such block; allowed are device, summary"):
            tables.fill("<!-- bench:nonsense -->\n<!-- /bench -->", lambda _: {})

    @pytest.mark.parametrize("text", ["<!-- bench:summary -->\nold\n", "<!-- bench:summary --> <!-- /bench -->"])
    def test_a_block_without_an_end_is_not_up_to_date(self, text, tmp_path):
        whole = "<!-- bench:summary -->\n<!-- /bench -->\n"
        for document in (text, whole + text, text + whole):
            with pytest.raises(
                ValueError, match=f"begins {document.count('bench:')} blocks, and {document.count(whole)}"
            ):
                tables.fill(document, lambda _: {})
        (tmp_path / "x.md").write_text(text)
        with pytest.raises(SystemExit, match=r"x\.md: <!-- bench: begins 1 blocks"):
            main(["bench", "--tables", str(tmp_path / "x.md"), "--check"])

    def test_the_gpu_is_meant_unless_there_are_two(self, tmp_path):
        assert tables.results_in(tmp_path, None) == {}
        for device, cuda in (("CPU", None), ("GPU A", "13.0")):
            records.save(
                tmp_path / records.file_name(device),
                records.merge({}, {**HEAD, "device": device, "cuda": cuda}, {}),
            )
        assert tables.results_in(tmp_path, None)["device"] == "GPU A"
        assert tables.results_in(tmp_path, "cpu")["device"] == "CPU"
        records.save(tmp_path / "gpu-b.json", records.merge({}, {**HEAD, "device": "GPU B"}, {}))
        with pytest.raises(ValueError, match="GPU A, GPU B"):
            tables.results_in(tmp_path, None)

    def test_the_command(self, results, tmp_path, capsys):
        document = tmp_path / "README.md"
        document.write_text("<!-- bench:summary -->\n<!-- /bench -->\n")
        records.save(tmp_path / "nvidia-test-1.json", results)
        arguments = ["bench", "--out", str(tmp_path), "--tables", str(document)]
        assert main([*arguments, "--check"]) == 1
        assert "is not what the results say" in capsys.readouterr().out
        assert main(arguments) == 0
        assert "| forward | bfloat16 | 64 | full | 4096 |" in document.read_text()
        assert main([*arguments, "--check"]) == 0

    def test_a_document_that_is_not_there(self, tmp_path, capsys):
        assert main(["bench", "--tables", str(tmp_path / "NONE.md")]) == 1
        assert "NONE.md" in capsys.readouterr().err

    def test_there_is_nothing_to_check_without_documents(self, monkeypatch):
        monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
        with pytest.raises(SystemExit, match=r"--check needs .* --tables"):
            main(["bench", "--cpu", "--check"])

    def test_the_documents_of_the_project_say_what_was_measured(self):
        documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        assert command.fill_documents(documents, ROOT / "bench/results", check=True) == 0

    def test_plain_tables_are_aligned(self):
        plain = console.Table("title", ["a", "long name"], [["1234", "5"], ["6", "7"]]).plain()
        assert plain.splitlines() == [
            "   a  long name",
            "----  ---------",
            "1234          5",
            "   6          7",
        ]


class TestPlots:
    def test_drawn_from_a_results_file(self, results, tmp_path):
        pytest.importorskip("matplotlib")
        drawn = plots.draw(results, tmp_path / "nvidia-test-1")
        assert [path.name for path in drawn] == [
            f"nvidia-test-1-{what}-bfloat16.png" for what in ("forward", "backward", "memory", "history", "variants")
        ]
        for path in drawn:
            assert path.read_bytes().startswith(b"\x89PNG")

    def test_nothing_measured_nothing_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        assert plots.draw(records.merge({}, HEAD, {}), tmp_path / "x") == []


class TestNaive:
    """The peer must compute the same thing, or comparing is pointless."""

    @pytest.mark.parametrize("causal", [False, True])
    def test_agrees_with_cuflash(self, causal):
        machine = Cpu()
        dout, q, k, v = (machine.normal((2, 3, 17, 8), "float64", seed) for seed in range(4))
        out, lse = cuflash.attention(q, k, v, causal=causal, return_lse=True)
        np.testing.assert_allclose(naive.forward(machine, q, k, v, causal), out, rtol=1e-5, atol=1e-6)
        p = naive.weights(machine, q, k, causal)
        gradients = naive.backward(machine, dout, q, k, v, p)
        expected = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal)
        for ours, theirs in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_keeps_the_dtype(self):
        machine = Cpu()
        q = machine.normal((1, 1, 5, 4), "float16", 0)
        assert naive.forward(machine, q, q, q, False).dtype == np.float16


class TestCpu:
    def test_peak_memory_is_what_is_held_beyond_the_result(self):
        def call():
            temporary = np.ones(3 << 20, np.uint8)
            return temporary[: 1 << 20].copy()

        peak = Cpu().peak_bytes(call)
        assert 2 << 20 < peak < (3 << 20) + 50_000

    def test_peak_memory_of_a_call_that_fails(self):
        def broken():
            raise MemoryError

        with pytest.raises(MemoryError):
            Cpu().peak_bytes(broken)
        assert Cpu().peak_bytes(lambda: None) < 10_000

    def test_the_data_is_random_and_reproducible(self):
        a, b = Cpu().normal((100,), "float32", 0), Cpu().normal((100,), "float32", 1)
        assert (a == Cpu().normal((100,), "float32", 0)).all()
        assert not (a == b).any()


@pytest.fixture
def tiny(monkeypatch):
    """Sweeps that take no time."""
    monkeypatch.setitem(cells.AXES, ("cpu", "quick"), ([8], [16, 32]))
    cell = Cell(8, True, 256, batch=1, heads=2, dtype="float32")
    monkeypatch.setattr(sweeps, "memory_cells", lambda kind, dtype: [cell])


class TestBench:
    def test_measures_numpy(self, tiny, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        assert main(["bench", "--cpu", "--sweep", "quick", "memory", "host", "--out", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "The sweep 'host' needs a GPU: left out." in shown
        assert "[10/10] peak memory, backward B 1 H 2 S 256 D 8 causal float32" in shown
        (path,) = tmp_path.glob("*.json")
        saved = records.load(path)
        check_schema(saved)
        assert saved["sources_digest"] == info.sources_digest()
        assert len(saved["records"]) == 8
        assert {entry["kernel"] for entry in saved["records"]} == {"numpy"}
        assert all(entry["peers"]["naive"]["ms"] > 0 for entry in saved["records"])
        matrix = 2 * 256 * 256 * 4
        naive_peaks = {entry["op"]: entry["peers"]["naive"]["peak_bytes"] for entry in saved["memory"]}
        assert naive_peaks["forward"] >= matrix
        assert naive_peaks["backward"] > 2.9 * matrix  # the weights, their gradient, and the product of both
        assert len(list(tmp_path.glob("*.png"))) == 3

    def test_choices(self, tiny, tmp_path):
        arguments = ["--op", "forward", "--peers", "--dtype", "float64", "--out", str(tmp_path)]
        assert main(["bench", "--cpu", *arguments]) == 0
        (path,) = tmp_path.glob("*.json")
        for entry in records.load(path)["records"]:
            assert (entry["op"], entry["dtype"], "peers" in entry) == ("forward", "float64", False)

    def test_writes_nothing_unless_told_where(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["bench", "--cpu", "--op", "forward"]) == 0
        assert list(tmp_path.iterdir()) == []
        assert "GFLOP/s" in capsys.readouterr().out

    def test_a_second_run_adds_to_the_first(self, tiny, tmp_path):
        for op in cells.OPS:
            assert main(["bench", "--cpu", "--op", op, "--out", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("*.json")
        assert len(records.load(path)["records"]) == 8

    def test_stops_when_the_budget_is_spent_and_keeps_what_it_has(self, tiny, tmp_path, monkeypatch, capsys):
        clock = iter([0.0, 1.0, 2.0, 11.0])
        monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
        assert main(["bench", "--cpu", "--budget", "10", "--out", str(tmp_path)]) == 0
        assert "the budget of 10 s is spent: 6 steps are left out" in capsys.readouterr().out
        (path,) = tmp_path.glob("*.json")
        assert len(records.load(path)["records"]) == 2

    def test_interrupted_it_keeps_what_it_has(self, tmp_path):
        def interrupt():
            raise KeyboardInterrupt

        steps = [
            sweeps.Step("records", "one", lambda: sweeps.Outcome([record()])),
            sweeps.Step("records", "two", interrupt),
        ]
        assert not command.measure(Cpu(), steps, tmp_path / "x.json", None)
        assert len(records.load(tmp_path / "x.json")["records"]) == 1

    def test_a_kernel_that_fails_is_told_and_fails_the_run(self, tiny, tmp_path, monkeypatch, capsys):
        def broken(*_, **__):
            raise NotImplementedError("not on this machine")

        monkeypatch.setattr(cuflash, "attention", broken)
        assert main(["bench", "--cpu", "--op", "forward", "--out", str(tmp_path)]) == 1
        shown = capsys.readouterr().out
        assert "numpy failed: NotImplementedError: not on this machine" in shown
        assert "Nothing was measured." in shown

    def test_a_peer_that_fails_has_its_reason_in_the_record(self, tiny, tmp_path, monkeypatch, capsys):
        def broken(*_):
            raise MemoryError("no room")

        monkeypatch.setattr(naive, "forward", broken)
        assert main(["bench", "--cpu", "--op", "forward", "--out", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("*.json")
        assert records.load(path)["records"][0]["peers"] == {"naive": {"error": "MemoryError: no room"}}
        assert "naive: MemoryError: no room" in capsys.readouterr().out

    def test_without_matplotlib_there_are_numbers_and_a_hint(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main(["bench", "--cpu", "--op", "forward", "--out", str(tmp_path)]) == 0
        assert 'Try: pip install ".[bench]"' in capsys.readouterr().out

    def test_without_ml_dtypes_it_says_what_to_install(self, tiny, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
        with pytest.raises(SystemExit, match=r"bfloat16 needs the package ml_dtypes.* pip install ml_dtypes"):
            main(["bench", "--cpu", "--dtype", "bfloat16"])

    @pytest.mark.parametrize("peers", [["torch-cudnn"], ["torch-flash", "naive"]])
    def test_a_peer_that_was_asked_for_and_is_left_out_is_told(self, tiny, capsys, peers):
        assert main(["bench", "--cpu", "--op", "forward", "--peers", *peers]) == 0
        assert f"The peer {peers[0]!r} needs a GPU and torch: left out." in capsys.readouterr().out

    def test_peers_that_nobody_asked_for_are_left_out_silently(self, tiny, capsys):
        assert main(["bench", "--cpu", "--op", "forward"]) == 0
        assert "left out" not in capsys.readouterr().out

    def test_a_kernel_on_a_cpu_is_refused_at_once(self, monkeypatch):
        monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
        with pytest.raises(SystemExit, match=r"error: --kernel wmma fa1 needs a GPU$"):
            main(["bench", "--cpu", "--kernel", "auto", "wmma", "fa1"])

    def test_where_no_results_can_go_is_told_at_once(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
        taken = tmp_path / "results.json"
        taken.write_text("")
        assert main(["bench", "--cpu", "--out", str(taken)]) == 1
        assert str(taken) in capsys.readouterr().err

    @pytest.mark.parametrize("budget", ["-1", "nan", "-inf", "soon"])
    def test_what_is_no_budget_is_refused(self, monkeypatch, capsys, budget):
        monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
        with pytest.raises(SystemExit):
            main(["bench", "--cpu", f"--budget={budget}"])
        assert f"argument --budget: got {budget!r}; it must be a number >= 0" in capsys.readouterr().err

    def test_on_a_terminal_without_rich(self, tiny, monkeypatch, capsys):
        monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setitem(sys.modules, "rich", None)
        assert main(["bench", "--cpu", "--op", "forward"]) == 0
        assert "[4/4] forward" in capsys.readouterr().out

    def test_on_a_terminal_with_rich(self, tiny, monkeypatch, capsys):
        pytest.importorskip("rich")
        monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
        assert main(["bench", "--cpu", "--op", "forward"]) == 0
        shown = capsys.readouterr().out
        assert "Forward, GFLOP/s" in shown
        assert "[4/4]" not in shown


@pytest.fixture
def small_variants(monkeypatch):
    """Variants of few tokens, timed in no time."""
    monkeypatch.setitem(variants.SIZES, "cpu", variants.Sizes(width=1024, seqlen=16, batch=4))
    monkeypatch.setattr(sweeps, "measure_in_turn", partial(measure_in_turn, rounds=1, round_ms=0))


def variant_named(name):
    return next(variant for variant in variants.VARIANTS if variant.name == name)


def seen_pairs(machine, variant, cell):
    """The pairs that a call shows, counted: each query that sees n keys has lse log(n) if all scores are 0."""
    options = variant.options(machine, cell)
    q = np.zeros((cell.batch * cell.seqlen, cell.heads, cell.head_dim), np.float32)
    if variant.packed:
        lengths = np.array(variants.offsets(cell), np.int32)
        _, lse = cuflash.attention_varlen(q, q, q, lengths, lengths, return_lse=True, **options)
    else:
        k = np.zeros(cell.shape_kv, np.float32)
        _, lse = cuflash.attention(q.reshape(cell.shape), k, k, return_lse=True, **options)
    return float(np.exp(lse).sum())


class TestVariants:
    def test_the_cells_are_those_of_the_other_sweeps(self):
        for variant in variants.VARIANTS:
            for cell in variant.plain_cells(variants.SIZES["gpu"], "bfloat16"):
                assert cell.batch * cell.seqlen == cells.TOKENS
                assert cell.heads * cell.head_dim == cells.WIDTH

    @pytest.mark.parametrize(
        ("name", "seqlens"), [("odd", (4033, 4033)), ("short_q", (1024, 4096)), ("gqa4", (4096, 4096))]
    )
    def test_lengths_of_queries_and_keys(self, name, seqlens):
        for cell in variant_named(name).cells(variants.SIZES["gpu"], "bfloat16"):
            assert (cell.shape[2], cell.shape_kv[2]) == seqlens
            assert cell.pairs == cell.batch * cell.heads * seqlens[0] * seqlens[1]

    def test_random_lengths_have_the_tokens_of_the_cell(self):
        (cell, _) = variant_named("varlen").cells(variants.SIZES["gpu"], "bfloat16")
        lengths = np.diff(variants.offsets(cell))
        assert (lengths > 0).all()
        assert (lengths.sum(), lengths.mean(), len(set(lengths))) == (16384, 2048, 8)
        padded = variants.padded(cell)
        assert (padded.batch, padded.seqlen, padded.heads) == (8, lengths.max(), cell.heads)

    @pytest.mark.parametrize(
        "name", ["softcap", "window", "wide_window", "gqa8", "short_q", "odd", "varlen", "dropout", "mask_mod"]
    )
    def test_pairs_are_those_that_are_seen(self, name):
        variant = replace(variant_named(name), group=1)
        cell = variant.cells(variants.Sizes(width=16, seqlen=128, batch=4), "float32")[0]
        cell = replace(cell, head_dim=8, heads=2)
        if name == "softcap":
            variant = replace(variant, options=lambda *_: {})
        # Half of all pairs stands for the causal ones, n^2 / 2 for n (n + 1) / 2; the others are counted exactly.
        tolerance = 0.13 if name in ("varlen", "mask_mod") else 1e-4
        assert variant.pairs(cell) == pytest.approx(seen_pairs(Cpu(), variant, cell), rel=tolerance)

    def test_grouped_heads_share_keys(self):
        variant, machine = variant_named("gqa8"), Cpu()
        (cell, _) = variant.cells(variants.Sizes(width=1024, seqlen=16, batch=4), "float32")
        dq, dk, dv = variant.prepare(machine, "backward", cell, "auto")().call()
        assert (dq.shape[1], dk.shape[1], dv.shape[1]) == (16, 2, 2)

    def test_a_causal_mask_mod_computes_what_causal_does(self):
        variant, machine = variant_named("mask_mod"), Cpu()
        cell = Cell(8, True, 300, batch=1, heads=2, dtype="float64")
        for op in cells.OPS:
            programmed = variant.prepare(machine, op, cell, "auto")().call()
            built_in = variants.PLAIN.prepare(machine, op, cell, "auto")().call()
            for ours, theirs in zip(programmed, built_in, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)

    def test_the_mask_shows_four_fifths(self):
        cell = Cell(8, False, 300, batch=1, heads=2, dtype="float32")
        mask = variant_named("mask").options(Cpu(), cell)["mask"]
        assert (mask.shape, mask.dtype) == ((1, 1, 300, 300), bool)
        assert mask.mean() == pytest.approx(0.8, abs=0.01)

    def test_measured_on_numpy(self, small_variants, tmp_path, capsys):
        assert main(["bench", "--cpu", "--sweep", "variants", "--out", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("*.json")
        saved = records.load(path)
        check_schema(saved)
        assert len(saved["variants"]) == 68
        assert all("error" not in peer for entry in saved["variants"] for peer in entry["peers"].values())
        assert {entry["variant"] for entry in saved["variants"] if "padding" in entry} == {"varlen"}
        assert {entry["heads"] // entry["heads_kv"] for entry in saved["variants"] if entry["variant"] == "gqa8"} == {8}
        assert "of the work really done" in capsys.readouterr().out

    def test_a_variant_that_fails_is_told_and_the_others_go_on(self, small_variants, tmp_path, monkeypatch, capsys):
        def broken(*_, **__):
            raise NotImplementedError("no packed sequences")

        monkeypatch.setattr(cuflash, "attention_varlen", broken)
        arguments = ["--op", "forward", "--out", str(tmp_path)]
        assert main(["bench", "--cpu", "--sweep", "variants", *arguments]) == 1
        assert "numpy failed: NotImplementedError: no packed sequences" in capsys.readouterr().out
        (path,) = tmp_path.glob("*.json")
        assert len(records.load(path)["variants"]) == 2 * 14 + 1

    def test_without_the_plain_rate_there_is_no_ratio(self, results):
        entry = {key: value for key, value in variant_records()[0].items() if key != "ratio"}
        (row,) = tables.variants({**results, "variants": [entry]}).rows
        assert list(row[5:]) == ["", "", "", "0.85"]


class _Recorder:
    """A GPU that takes every launch and does nothing."""

    chip = Chip("NVIDIA H200", (9, 0), 227 << 10)
    null = np.uint64(0)

    def __init__(self):
        self.loaded = set()

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    zeros = empty

    def temporaries(self):
        return nullcontext()

    def pointer(self, array):
        return array.ctypes.data

    def struct(self, params):
        return params

    def addresses(self, *arrays):
        return tuple(map(self.pointer, arrays))

    def tensor_maps(self, arrays, dtype):
        return bytes(128 * len(arrays))

    def counter(self):
        return None

    def load(self, kernels):
        self.loaded.update(kernel.code for kernel in kernels)
        return [lambda *_: None for _ in kernels]


FAMILIES_OF = {"forward": ["sm90", "wmma"], "backward": ["sm90", "wmma"]}


class TestCompilingAhead:
    """The variants as a GPU gets them, on a device that computes nothing."""

    @pytest.fixture
    def device(self, monkeypatch):
        device = _Recorder()
        monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(device))
        machine = Cpu()
        machine.kind = "gpu"
        monkeypatch.setattr(ahead, "_gpu", lambda: machine)
        return device

    @pytest.fixture
    def in_this_process(self, monkeypatch):
        class Pool:
            def __init__(self, *_, **__):
                self.map = map

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(ahead, "ProcessPoolExecutor", Pool)

    def test_compiles_what_is_measured(self, device, in_this_process, monkeypatch):
        pytest.importorskip("ml_dtypes")
        machine = ahead._gpu()
        monkeypatch.setattr(machine, "normal", lambda shape, dtype, seed: np.zeros(shape, dtype_named(dtype)))
        ahead.compile_variants(cells.OPS, lambda op, cell: FAMILIES_OF[op], "bfloat16")
        compiled, device.loaded = device.loaded, set()
        for variant in (variants.PLAIN, *variants.VARIANTS):
            sizes = variants.Sizes(width=1024, seqlen=2304, batch=1)
            for cell in (*variant.cells(sizes, "bfloat16"), *variant.plain_cells(sizes, "bfloat16")):
                for op in variant.ops:
                    for family in FAMILIES_OF[op]:
                        variant.prepare(machine, op, cell, family)().call()
        assert len(compiled) > 80
        assert device.loaded <= compiled

    def test_what_fails_is_left_to_the_measurement(self, device, in_this_process, monkeypatch):
        def broken(*_, **__):
            raise NotImplementedError("not on this machine")

        monkeypatch.setattr(cuflash, "attention", broken)
        monkeypatch.setattr(ahead, "FEW", variants.Sizes(width=1024, seqlen=16, batch=1))
        ahead.compile_variants(["forward"], lambda op, cell: ["auto"], "float16")
        assert device.loaded  # those of packed sequences

    def test_it_is_the_first_step_on_a_gpu(self, device, monkeypatch):
        asked = []

        def compile_variants(ops, kernels_of, dtype):
            asked.append((ops, [*kernels_of("forward", cells.small_cell(dtype))], dtype))

        monkeypatch.setattr(ahead, "compile_variants", compile_variants)
        choice = sweeps.Choice(ops=["forward"], kernels=["auto"], peers=[], dtype="bfloat16")
        first, *others = sweeps.plan(ahead._gpu(), "variants", choice)
        assert first.run() == sweeps.Outcome([])
        assert asked == [(["forward"], ["auto"], "bfloat16")]
        assert len(others) == 2 * 15 + 1

    @pytest.mark.parametrize(
        ("capability", "op", "dtype", "expected"),
        [
            ((9, 0), "forward", "bfloat16", ["sm90", "sm80", "wmma"]),
            ((9, 0), "backward", "bfloat16", ["sm90", "sm80", "wmma"]),
            ((9, 0), "forward", "float32", ["sm80", "wmma"]),
            ((9, 0), "backward", "float32", ["sm80", "wmma"]),
            ((8, 0), "forward", "float16", ["sm80", "wmma"]),
            ((7, 5), "forward", "bfloat16", ["auto"]),
        ],
    )
    def test_the_families_of_a_gpu(self, capability, op, dtype, expected):
        pytest.importorskip("cupy")
        from cuflash._cli.bench.gpu import Gpu

        machine = Gpu.__new__(Gpu)
        machine._chip = Chip("a GPU", capability, 227 << 10)
        cell = replace(CELL, dtype=dtype)
        assert machine.kernels(op, cell) == expected
        assert machine.kernel_name(op, cell, "auto") == expected[0]
        assert machine.kernel_name(op, cell, "fa1") == "fa1"

    def test_a_family_is_measured_where_it_can_compute(self, device, monkeypatch):
        machine = ahead._gpu()
        monkeypatch.setattr(machine, "kernels", lambda op, cell: FAMILIES_OF[op])
        monkeypatch.setattr(machine, "kernel_name", lambda op, cell, kernel: kernel)
        choice = sweeps.Choice(ops=cells.OPS, kernels=[], peers=[], dtype="bfloat16")
        _, *steps = sweeps.plan(machine, "variants", choice)
        asked = {(step.run.args[2], step.run.args[-1]) for step in steps}
        assert asked == {(op, family) for op in cells.OPS for family in FAMILIES_OF[op]}

    def test_the_first_call_of_every_family_is_measured(self, device, monkeypatch):
        pytest.importorskip("ml_dtypes")
        machine, asked = ahead._gpu(), set()

        def cold_and_warm(op, cell, kernel, options):
            arrays = [np.zeros(cell.shape, np.float32).astype(dtype_named(cell.dtype)) for _ in range(5)]
            if op == "forward":
                cuflash.attention(*arrays[:3], kernel=kernel, **options or {})
            else:
                lse = np.zeros(cell.shape[:-1], np.float32)
                cuflash.attention_backward(*arrays, lse, kernel=kernel, **options or {})
            asked.add((op, kernel, cell.head_dim, bool(options)))
            return {"cold_s": 1.0}

        monkeypatch.setattr(first_call, "cold_and_warm", cold_and_warm)
        monkeypatch.setattr(machine, "kernels", lambda op, cell: list(AUTO))
        monkeypatch.setattr(machine, "kernel_name", lambda op, cell, kernel: kernel)
        choice = sweeps.Choice(ops=cells.OPS, kernels=[], peers=[], dtype="bfloat16")
        for step in sweeps.plan(machine, "compile", choice):
            assert step.run().failures == {}
        plain, combined = (
            product(cells.OPS, AUTO, (64, 128, 256), (False,)),
            product(cells.OPS, AUTO, (64, 128), (True,)),
        )
        assert asked == {*plain, *combined}


class TestFirstCall:
    """With a stand-in for the process that needs a GPU."""

    def test_cold_and_warm(self, monkeypatch):
        stand_in = """
import json, os, pathlib, sys
op, kernel, dtype, shape, options = json.loads(sys.argv[1])
assert (op, kernel, dtype, shape) == ("backward", "wmma", "bfloat16", [1, 8, 128, 64])
assert options == {"softcap": 30.0}
import cuflash
cache = pathlib.Path(os.environ["CUPY_CACHE_DIR"])
warm = any(cache.iterdir())
for name in "abc":
    (cache / f"{name}.cubin").write_bytes(b"")
print("a word from a library")
print(json.dumps({"import_s": 0.1, "first_call_s": 0.2 if warm else 3.0}))
"""
        monkeypatch.setattr(first_call, "CHILD", stand_in)
        seconds = first_call.cold_and_warm("backward", cells.small_cell("bfloat16"), "wmma", {"softcap": 30.0})
        assert seconds == {"num_kernels": 3, "cold_s": 3.0, "warm_s": 0.3}

    def test_a_process_that_fails(self, monkeypatch):
        monkeypatch.setattr(first_call, "CHILD", "raise SystemExit('no GPU here')")
        with pytest.raises(RuntimeError, match="no GPU here"):
            first_call.cold_and_warm("forward", cells.small_cell("bfloat16"), "wmma")

    def test_the_real_process_is_python(self):
        compile(first_call.CHILD, "first_call", "exec")


class _DeviceArray(np.ndarray):
    """A NumPy array with CuPy's way to say where its data is."""

    @property
    def data(self):
        return type("Memory", (), {"ptr": self.ctypes.data})


def _on_device(array):
    return np.ascontiguousarray(array).view(_DeviceArray)


def _cublas_gemm(_, trans_a, trans_b, m, n, k, alpha, *rest):
    """What cublasGemmStridedBatchedEx does, here for float32: matrices lie column by column."""
    (a, _, lda, stride_a), (b, _, ldb, stride_b), beta, (c, _, ldc, stride_c) = (
        rest[:4],
        rest[4:8],
        rest[8],
        rest[9:13],
    )
    batch = rest[13]
    floats = ctypes.POINTER(ctypes.c_float)
    assert ctypes.cast(alpha, floats)[0] == 1
    assert ctypes.cast(beta, floats)[0] == 0

    def element(pointer, ld, stride, number, row, column):
        return ctypes.cast(pointer, floats)[number * stride + column * ld + row]

    for number in range(batch):
        for row in range(m):
            for column in range(n):
                ctypes.cast(c, floats)[number * stride_c + column * ldc + row] = sum(
                    element(a, lda, stride_a, number, *((inner, row) if trans_a else (row, inner)))
                    * element(b, ldb, stride_b, number, *((column, inner) if trans_b else (inner, column)))
                    for inner in range(k)
                )


class TestGpuWithoutOne:
    """What can be proved about measuring on a GPU with CuPy alone."""

    @pytest.fixture
    def gpu(self):
        pytest.importorskip("cupy")
        from cuflash._cli.bench import gpu

        return gpu

    @pytest.mark.parametrize("transpose_a", [False, True])
    @pytest.mark.parametrize("transpose_b", [False, True])
    def test_matmul_asks_cublas_for_the_right_product(self, gpu, monkeypatch, transpose_a, transpose_b):
        import cupy_backends.cuda.libs as libs

        cublas = type("cublas", (), {"gemmStridedBatchedEx": staticmethod(_cublas_gemm)})
        monkeypatch.setitem(vars(libs), "cublas", cublas)  # without loading the real one
        monkeypatch.setattr(gpu.cupy.cuda.device, "get_cublas_handle", lambda: 0)
        monkeypatch.setattr(gpu.cupy, "empty", lambda shape, dtype: _on_device(np.empty(shape, dtype)))
        rng = np.random.default_rng(0)
        a = rng.standard_normal((2, 3, 4, 5), np.float32)
        b = rng.standard_normal((2, 3, 5, 6), np.float32)
        product = gpu.Gpu.matmul(
            None,
            _on_device(a.mT if transpose_a else a),
            _on_device(b.mT if transpose_b else b),
            transpose_a=transpose_a,
            transpose_b=transpose_b,
        )
        np.testing.assert_allclose(product, a @ b, rtol=1e-5, atol=1e-6)

    def test_peak_meter(self, gpu):
        meter = gpu._PeakMeter()
        for pointer, size in ((1, 100), (2, 50)):
            meter.malloc_postprocess(device_id=0, size=size, mem_size=size, mem_ptr=pointer, pmem_id=pointer)
        meter.free_postprocess(device_id=0, mem_size=100, mem_ptr=1, pmem_id=1)
        meter.malloc_postprocess(device_id=0, size=20, mem_size=20, mem_ptr=1, pmem_id=3)
        meter.free_postprocess(device_id=0, mem_size=999, mem_ptr=7, pmem_id=7)  # allocated before the meter
        meter.malloc_postprocess(device_id=0, size=10, mem_size=10, mem_ptr=0, pmem_id=0)  # failed
        assert (meter.peak, meter.live) == (150, 70)


class TestInfo:
    def test_text(self, capsys):
        assert main(["info"]) == 0
        shown = capsys.readouterr().out
        for label in (
            "cuflash",
            "Python",
            "NumPy",
            "driver",
            "CuPy",
            "NVRTC",
            "CUDA headers",
            "kernel cache",
        ):
            assert any(line.startswith(label) for line in shown.splitlines()), label
        assert cuflash.__version__ in shown
        assert "Attention works on NumPy arrays here" in shown

    def test_json(self, capsys):
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["cuflash"]["version"] == cuflash.__version__
        assert len(facts["cuflash"]["sources_digest"]) == 64

    def test_in_a_process_of_its_own_without_cupy(self):
        code = (
            "import sys; sys.modules['cupy'] = sys.modules['cupy_backends'] = None\n"
            "from cuflash._cli.main import main\n"
            "sys.exit(main(['info']))"
        )
        child = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        assert child.stderr == ""
        assert 'try: pip install ".[cuda1' in child.stdout
        assert "it needs what is missing above" in child.stdout

    def test_the_module_runs(self):
        child = subprocess.run(
            [sys.executable, "-m", "cuflash", "--help"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "{info,bench,tune}" in child.stdout

    def test_the_version(self, capsys):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["--version"])
        assert capsys.readouterr().out == f"cuflash {cuflash.__version__}\n"

    def test_kernels_are_told_by_capability(self):
        rows = {row["dtype"]: row for row in info.collect()["kernels"] if row["family"] == "wmma"}
        assert "sm_70" in rows["float16"]["runs_on"]
        assert "sm_70" not in rows["bfloat16"]["runs_on"]
        assert "8.0" in rows["bfloat16"]["why_not"]["sm_75"]

    def test_a_machine_with_a_gpu(self):
        facts = info.collect()
        gpu = {
            "id": 0,
            "name": "NVIDIA T4",
            "compute_capability": "7.5",
            "multiprocessors": 40,
            "memory_bytes": 16 << 30,
            "shared_memory_bytes": 64 << 10,
            "l2_cache_bytes": 4 << 20,
            "kernels": [
                {"family": "wmma", "dtype": "float16", "why_not": None},
                {"family": "wmma", "dtype": "bfloat16", "why_not": "needs sm_80"},
            ],
        }
        present = {"cupy": {"version": "14", "runtime": "12.9"}, "nvrtc": "12.9", "headers": ["/include"]}
        shown = info.describe({**facts, **present, "gpus": [gpu]})
        assert "GPU 0         NVIDIA T4, compute capability 7.5, 40 multiprocessors, 16 GiB" in shown
        assert "wmma    float16   runs" in shown
        assert "wmma    bfloat16  needs sm_80" in shown
        assert shown.endswith("on CuPy arrays it is ready.")
        lacking = info.describe({**facts, **present, "gpus": [gpu], "headers": {"missing": "no mma.h"}})
        assert "CUDA headers  missing: no mma.h" in lacking
        assert lacking.endswith("on CuPy arrays it needs what is missing above (headers).")

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        blocked = tmp_path / "file"
        blocked.write_text("")
        monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(blocked / "cache"))
        assert info.collect()["cache"] == {"directory": str(blocked / "cache"), "writable": False}
        assert "which cannot be written: set CUPY_CACHE_DIR" in info.describe(info.collect())

    def test_a_cache_of_someone_else(self, tmp_path, monkeypatch):
        monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(info.os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
        assert not info.collect()["cache"]["writable"]

    def test_a_cache_that_is_yet_to_be_made(self, tmp_path, monkeypatch):
        monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "a" / "b"))
        assert info.collect()["cache"]["writable"]

    def test_a_cache_in_memory(self, monkeypatch):
        monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
        assert "in memory" in info.describe(info.collect())


class _Tuned(_Recorder):
    """A GPU on which one tile is twice as fast as all others."""

    def __init__(self, fastest):
        super().__init__()
        self.fastest, self.launched = fastest, None

    def load(self, kernels):
        return [self._launcher(kernel) for kernel in kernels]

    def _launcher(self, kernel):
        arguments = re.search(r"cuflash::\w+<(.*)>;", kernel.code)[1].split(", ")[4:]
        tile = tuple(int(argument) for argument in arguments if argument not in ("true", "false"))

        def launch(*_):
            if "Finish" not in kernel.code and "Delta" not in kernel.code:
                self.launched = tile

        return launch


class TestTune:
    def test_lists_what_fits_a_gpu(self, capsys):
        assert main(["tune", "--arch", "sm_90", "--head-dim", "128"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        in_use = {row[0]: row for row in rows if row[-2:] == ["full,", "causal"] and row[1] != "backward"}
        assert set(in_use) == {"sm90", "sm80", "wmma"}
        assert sum(row[1:2] == ["backward"] for row in rows) > 10
        assert in_use["sm90"][1:7] == [str(number) for number in _sm90.TILES[128, 128][0]]
        assert sum(row[:1] == ["sm90"] for row in rows) > 10

    @pytest.mark.parametrize("head_dim", ["0", "257", "-8", "64.0", "many"])
    def test_head_dims_that_no_kernel_has(self, capsys, head_dim):
        with pytest.raises(SystemExit):
            main(["tune", "--arch", "sm_90", "--head-dim", head_dim])
        assert "allowed are 1 to 256" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arch", "families_"), [("sm_80", {"sm80", "wmma"}), ("sm_90", {"sm90", "sm80", "wmma"}), ("sm_70", set())]
    )
    def test_lists_the_families_of_a_gpu(self, arch, families_):
        (chip,) = (chip for chip in families.known_chips() if chip.arch == arch)
        table = tune.listed(chip, "bfloat16", 64)
        assert {row[0] for row in table.rows if "backward" not in row[0]} == families_
        assert {row[0].split()[0] for row in table.rows if "backward" in row[0]} == families_ - {"wmma"}
        assert all(float(row[2]) <= chip.shared_memory / 1024 for row in table.rows)

    def test_the_tiles_of_sm80_are_among_its_candidates(self):
        for (dim, dim_v, kib), tiles in _sm80_tiles.FORWARD_TILES.items():
            problem = Problem("bfloat16", 1, 1, 1, 4096, 4096, dim, dim_v, 1.0)
            chip = Chip("chip", (8, 0), kib * 1024)
            assert set(tiles) <= set(tune._sm80_candidates(problem, chip))
        for (dim, dim_v, kib), tiles in _sm80_tiles.DKDV_TILES.items():
            problem = Problem("bfloat16", 1, 1, 1, 4096, 4096, dim, dim_v, 1.0)
            chip = Chip("chip", (8, 0), kib * 1024)
            assert {(*tile[:-1], 1) for tile in tiles} <= set(tune._sm80_backward_candidates(problem, chip))

    def test_the_tiles_of_the_backward_of_sm90_compile_and_differ(self):
        (chip,) = (chip for chip in families.known_chips() if chip.arch == "sm_90")
        for head_dim in (64, 128, 192, 256):
            rows = tune.listed(chip, "bfloat16", head_dim).rows
            tiles = [tuple(map(int, row[1].split())) for row in rows if row[0] == "sm90 backward"]
            assert len({tile[:4] for tile in tiles}) == len(tiles) > 0, "places for pairs change no plain kernel"
            assert all(tile[3] > 1 for tile in tiles), "with one place for Q and dO there is no kernel"

    def test_a_dtype_that_no_kernel_of_a_gpu_takes(self):
        with pytest.raises(SystemExit, match=r"error: bfloat16 needs .* 8\.0 or newer, sm_70 has 7\.0\. .*float16$"):
            main(["tune", "--arch", "sm_70", "--dtype", "bfloat16"])

    def test_without_a_gpu_it_says_so(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "cuflash._cli.bench.gpu", None)
        assert main(["tune"]) == 1
        assert "No GPU to measure" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("fastest", "change"),
        [
            ((128, 64, 1, 4, 4, 1), "sm90, D 128, causal: 128 64 1 4 4 1 instead of 128 128 2 2 2 1, 100 % faster"),
            ((64, 64, 4), "wmma, D 128, full: 64 64 4 instead of 128 64 4, 100 % faster"),
            (
                (64, 128, 1, 2, 2),
                "sm90 backward, D 128, causal: 64 128 1 2 2 instead of 64 128 2 2 1, 100 % faster",
            ),
            (
                (64, 64, 8, 2, 1, 1, 1),
                "sm80 backward, D 128, full: 64 64 8 2 1 1 1 instead of 128 128 8 2 2 1 1, 100 % faster",
            ),
        ],
    )
    def test_shows_what_it_would_change_and_changes_nothing(self, monkeypatch, fastest, change):
        pytest.importorskip("ml_dtypes")
        machine = Cpu()
        machine.device = _Tuned(fastest)
        monkeypatch.setattr(machine, "normal", lambda shape, dtype, seed: np.zeros(shape, dtype_named(dtype)))

        def sample(call, repeats):
            call()
            return [0.5 if machine.device.launched == fastest else 1.0] * repeats

        monkeypatch.setattr(machine, "sample", sample)
        monkeypatch.setattr(tune, "TOKENS", tune.SEQLEN)
        tables_before = [dict(family.table) for family in tune.TUNED]
        table, changes = tune.measured(machine, "bfloat16", 128)
        assert [dict(family.table) for family in tune.TUNED] == tables_before
        assert len(changes) == 2
        assert change in changes
        assert all(sum("*" in row[column] for row in table.rows) == len(tune.TUNED) for column in (2, 3))
