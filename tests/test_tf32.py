"""float32 has float32's accuracy, and TF32's only where the user asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _backends
from cuflash._device import Chip
from cuflash._kernel import HEAD_DIMS
from cuflash._launch import LaunchBackend
from cuflash.testing import (
    assert_attention_accurate,
    assert_gradients_accurate,
    reference_attention,
    reference_attention_backward,
)
from cuflash.testing.strategies import AttentionProblem
from tests.hostcuda import HostDevice
from tests.test_sm90 import Notebook, put

KERNELS = ("wmma", "sm80")
ERRORS = """
import sys
import cupy as xp
from tests.test_tf32 import errors
print(max(errors(xp, sys.argv[1])))
"""


def errors(xp: Any, kernel: str) -> list[float]:
    """The largest errors of the output and the gradients, relative to their largest values."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 64, 64), dtype=np.float32) for _ in range(4)]
    q, k, v, dout = map(xp.asarray, arrays)
    out, vjp = cuflash.attention_vjp(q, k, v, kernel=kernel)
    expected = reference_attention(*arrays[:3])[0], *reference_attention_backward(arrays[3], *arrays[:3])
    results = [result if xp is np else result.get() for result in (out, *vjp(dout))]
    pairs = zip(results, expected, strict=True)
    return [float(abs(result - exact).max() / abs(exact).max()) for result, exact in pairs]


@pytest.mark.parametrize("kernel", [pytest.param("wmma", marks=pytest.mark.thorough), "sm80"])
@pytest.mark.host
def test_tf32_on_request(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(HostDevice()))
    assert max(errors(np, kernel)) < 2e-6
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(HostDevice(), tf32=True))
    assert all(2e-5 < error < 5e-3 for error in errors(np, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value, low, high", [("0", 0.0, 2e-6), ("1", 2e-5, 5e-3)])
@pytest.mark.gpu
def test_cupy_tf32_asks_for_it(gpu: Any, value: str, low: float, high: float, kernel: str) -> None:
    environment = {**os.environ, "CUPY_TF32": value}
    command = [sys.executable, "-c", ERRORS, kernel]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert low <= float(result.stdout) < high


@pytest.mark.parametrize(("kib", "of_wmma"), [(99, {(256, 256)}), (163, set()), (227, set())], ids=["99", "163", "227"])
def test_auto_gives_sm80_what_it_has_gradients_of(
    monkeypatch: pytest.MonkeyPatch, kib: int, of_wmma: set[tuple[int, int]]
) -> None:
    for head_dims in HEAD_DIMS:
        notebook = put(monkeypatch, Notebook(Chip("chip", (8, 0), kib << 10)))
        q, v = (np.zeros((132, 256, dim), "float32") for dim in head_dims)
        out, lse = cuflash.attention(q, q, v, return_lse=True)
        cuflash.attention_backward(v, q, q, v, out, lse)
        found = {symbol.split("_")[2] for symbol in notebook.symbols if "delta" not in symbol}
        assert found == {"wmma" if head_dims in of_wmma else "sm80"}, head_dims


def test_sm80_has_no_gradients_of_the_longest_rows_where_memory_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = put(monkeypatch, Notebook(Chip("Ada", (8, 9), 99 << 10)))
    x, lse = np.zeros((132, 256, 256), "float32"), np.zeros((132, 256), "float32")
    with pytest.raises(NotImplementedError, match="Ada has too little shared memory for a tile with head_dim 256"):
        cuflash.attention_backward(x, x, x, x, x, lse, kernel="sm80")
    assert notebook.symbols == []
    cuflash.attention_backward(x, x, x, x, x, lse)
    assert {symbol[:19] for symbol in notebook.symbols[1:]} == {"cuflash_bwd_wmma_dk", "cuflash_bwd_wmma_dq"}


LESS_COMMON = [(*dims, kib) for dims in ((192, 128), (192, 192)) for kib in (99, 163, 227)] + [(256, 256, 163)]


@pytest.mark.host
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "kib"),
    [
        *((256, 256, 99), (256, 256, 227)),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in LESS_COMMON),
    ],
)
def test_long_rows_by_sm80(monkeypatch: pytest.MonkeyPatch, head_dim: int, head_dim_v: int, kib: int) -> None:
    device = HostDevice(Chip("chip", (8, 0), kib << 10), schedule="greedy", cp_async="lazy")
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(device))
    q, k, v = (2, 2, 66, head_dim), (2, 1, 70, head_dim), (2, 1, 70, head_dim_v)
    for causal in (False, True):  # without hidden pairs nobody computes anew what is not finite
        problem = AttentionProblem(q, k, v, "float32", causal=causal)
        out, lse = cuflash.attention(*problem.arrays(), causal=causal, return_lse=True, kernel="sm80")
        assert_attention_accurate(*problem.arrays(), out, lse, causal=causal)
        if (head_dim, kib) == (256, 99):
            continue  # no tile fits
        arrays = problem.dout(), *problem.arrays()
        gradients = cuflash.attention_backward(*arrays, out, lse, causal=causal, kernel="sm80")
        assert_gradients_accurate(*arrays, *gradients, causal=causal)


@pytest.mark.host
@pytest.mark.parametrize("name", ["dout", "q", "k", "v"])
def test_nan_in_long_rows_by_sm80(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It reaches the queries and keys that see it, and no others, whichever of two warps has met it."""
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(HostDevice()))
    problem = AttentionProblem((2, 66, 256), (1, 70, 256), (1, 70, 256), "float32", causal=True)
    arrays = dict(zip(("dout", "q", "k", "v"), (problem.dout(), *problem.arrays()), strict=True))
    arrays[name][0, 40, 200] = np.nan
    out, lse = cuflash.attention(*list(arrays.values())[1:], causal=True, return_lse=True, kernel="sm80")
    gradients = cuflash.attention_backward(*arrays.values(), out, lse, causal=True, kernel="sm80")
    assert_gradients_accurate(*arrays.values(), *gradients, causal=True)
