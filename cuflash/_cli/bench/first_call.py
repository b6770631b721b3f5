"""What the first call of a process costs: with an empty kernel cache, and with the kernels in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuflash._cli.bench.cells import Cell, Op

# Runs in a process of its own. CuPy, the CUDA context and the inputs are ready before the clock starts.
CHILD = """
import json, sys, time
import cupy, numpy

op, kernel, dtype, shape, options = json.loads(sys.argv[1])
if dtype == "bfloat16":
    import ml_dtypes
    dtype = ml_dtypes.bfloat16
shape = tuple(shape)
q, k, v, out, dout = (cupy.zeros(shape, dtype) for _ in range(5))
lse = cupy.zeros(shape[:-1], numpy.float32)
cupy.cuda.get_current_stream().synchronize()

start = time.perf_counter()
import cuflash
imported = time.perf_counter()
if op == "forward":
    cuflash.attention(q, k, v, kernel=kernel, **options)
else:
    cuflash.attention_backward(dout, q, k, v, out, lse, kernel=kernel, **options)
cupy.cuda.get_current_stream().synchronize()
print(json.dumps({"import_s": imported - start, "first_call_s": time.perf_counter() - imported}))
"""


def cold_and_warm(op: Op, cell: Cell, kernel: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Seconds until the first result, beyond importing CuPy and making the inputs.

    ``options`` are those of the call; numbers and strings.

    Returns
    -------
    dict
        ``num_kernels`` that were compiled, at the same time, ``cold_s`` for the first call with an empty cache, and
        ``warm_s`` for importing cuflash and the first call in a new process that finds the cache of the first one.
    """
    arguments = json.dumps([op, kernel, cell.dtype, cell.shape, options or {}])
    with tempfile.TemporaryDirectory(prefix="cuflash-cache-") as cache:
        cold = _run(arguments, cache)
        num_kernels = sum(1 for file in Path(cache).rglob("*.cubin"))
        warm = _run(arguments, cache)
    return {
        "num_kernels": num_kernels,
        "cold_s": round(cold["first_call_s"], 3),
        "warm_s": round(warm["import_s"] + warm["first_call_s"], 3),
    }


def _run(arguments: str, cache: str) -> dict[str, float]:
    import cuflash

    source_root = str(Path(cuflash.__file__).resolve().parents[1])
    search_path = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CUPY_CACHE_DIR": cache, "PYTHONPATH": search_path}
    environment.pop("CUPY_CACHE_IN_MEMORY", None)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError((child.stderr.strip().splitlines() or ["the process failed"])[-1])
    seconds: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return seconds
