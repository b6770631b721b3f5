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
from cuflash._launch import LaunchBackend
from cuflash.testing import reference_attention, reference_attention_backward
from tests.hostcuda import HostDevice

ERRORS = """
import cupy as xp
from tests.test_tf32 import errors
print(max(errors(xp)))
"""


def errors(xp: Any) -> list[float]:
    """The largest errors of the output and the gradients, relative to their largest values."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 64, 64), dtype=np.float32) for _ in range(4)]
    q, k, v, dout = map(xp.asarray, arrays)
    out, vjp = cuflash.attention_vjp(q, k, v)
    expected = reference_attention(*arrays[:3])[0], *reference_attention_backward(arrays[3], *arrays[:3])
    results = [result if xp is np else result.get() for result in (out, *vjp(dout))]
    pairs = zip(results, expected, strict=True)
    return [float(abs(result - exact).max() / abs(exact).max()) for result, exact in pairs]


@pytest.mark.host
def test_tf32_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(HostDevice()))
    assert max(errors(np)) < 2e-6
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(HostDevice(), tf32=True))
    assert all(2e-5 < error < 5e-3 for error in errors(np))


@pytest.mark.parametrize("value, low, high", [("0", 0.0, 2e-6), ("1", 2e-5, 5e-3)])
@pytest.mark.gpu
def test_cupy_tf32_asks_for_it(gpu: Any, value: str, low: float, high: float) -> None:
    environment = {**os.environ, "CUPY_TF32": value}
    result = subprocess.run([sys.executable, "-c", ERRORS], env=environment, capture_output=True, text=True, check=True)
    assert low <= float(result.stdout) < high
