"""Hopper's kernels on the CPU, where tests/hostcuda emulates TMA, barriers, wgmma and clusters; few problems.

Copies may come late here ("lazy"), but products are there at once: what reads a sum too early is for the gpu ring.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash import _backends, _dbias
from cuflash._device import Chip, KernelSource, Launch
from cuflash._launch import LaunchBackend
from cuflash.testing.strategies import AttentionProblem, PackedProblem, PairArray
from tests.conftest import Ring, forget_plans, host_ring
from tests.hostcuda import CompileError, HostCudaError, HostDevice
from tests.mistakes import seed_mistake

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host ring needs g++"),
]

HOPPER = Chip("hostcuda", (9, 0), 227 * 1024, multiprocessors=3)  # few, so that blocks stay for several jobs


@dataclass(frozen=True)
class Hopper(HostDevice):
    """A chip whose kernels run on the CPU; it notes which."""

    chip: Chip = HOPPER
    headers: set[str] = field(default_factory=set)

    def load(self, kernels: Sequence[KernelSource]) -> list[Launch]:
        for kernel in kernels:
            self.headers.update(re.findall(r"<cuflash/kernels/(\w*sm90\w*)\.cuh>", kernel.code))
        return super().load(kernels)


@contextmanager
def ring_on(device: Hopper) -> Iterator[Ring]:
    """Calls on NumPy arrays go to the sm90 family on this device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "numpy_backend", LaunchBackend(device))
        patch.setattr(_dbias, "MIN_TILES", 1)
        forget_plans()
        yield host_ring("sm90")
    forget_plans()


def problem(head_dim: int = 64, head_dim_v: int = 0, seqlens: tuple[int, int] = (157, 203), **options: Any) -> Any:
    """Two heads that share one key head, of odd lengths."""
    rows, keys = seqlens
    kv = (head_dim, head_dim_v or head_dim)
    return AttentionProblem((2, rows, head_dim), (1, keys, kv[0]), (1, keys, kv[1]), "float16", **options)


WAYS: dict[str, dict[str, Any]] = {
    "forward": {},
    "lazy": {"cp_async": "lazy", "schedule": "reverse"},
    "greedy": {"schedule": "greedy"},
    "random": {"schedule": "random", "seed": 1, "cp_async": "lazy"},
}
CAUSAL = problem(causal=True)
WIDE = problem(256, softcap=5.0)
WITH_BIAS = problem(bias=PairArray((2, 157, 203)), causal=True)
PACKED = PackedProblem(
    lengths_q=(30, 0, 140, 1),
    lengths_k=(90, 5, 150, 0),
    heads=(2, 1),
    head_dims=(64, 64),
    tails=(7, 9),
    dtype="float16",
)


@pytest.mark.parametrize("way", WAYS)
def test_causal_in_every_way(way: str) -> None:
    device = Hopper(**WAYS[way])
    with ring_on(device) as ring:
        ring.check_forward(CAUSAL)
        ring.check_backward(CAUSAL)
        ring.check_backward(CAUSAL, deterministic=True)
    assert device.headers == {"fwd_sm90", "bwd_sm90", "bwd_sm90_dkdv", "bwd_sm90_dq", "bwd_sm90_finish"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(problem(128, window_size=(60, 20)), id="128 columns, whose dQ goes by way of the copy engine"),
        pytest.param(problem(64, 40, dropout_p=0.3), id="dropout"),
    ],
)
def test_other_calls(case: AttentionProblem) -> None:
    with ring_on(Hopper(**WAYS["lazy"])) as ring:
        ring.check_forward(case)
        for deterministic in (False, True):
            ring.check_backward(case, deterministic=deterministic)


def test_wide_rows() -> None:
    device = Hopper(**WAYS["lazy"])
    with ring_on(device) as ring:
        ring.check_backward(WIDE)
    assert device.headers >= {"bwd_sm90_dkdv_wide", "bwd_sm90_dq"}


# With the last keys the first block of a cluster has some, and the second none.
SECOND_BLOCK_WITHOUT_KEYS = problem(seqlens=(10, 1030), bias=PairArray((2, 10, 1030)))


@pytest.mark.parametrize(
    "case", [pytest.param(WITH_BIAS, id="causal"), pytest.param(SECOND_BLOCK_WITHOUT_KEYS, id="a block without keys")]
)
def test_the_gradient_of_a_bias(case: AttentionProblem) -> None:
    device = Hopper(**WAYS["lazy"])
    with ring_on(device) as ring:
        ring.check_backward(case, deterministic=True)
    assert "bwd_sm90_dbias" in device.headers


def test_packed_sequences() -> None:
    with ring_on(Hopper(**WAYS["lazy"])) as ring:
        ring.check_varlen(PACKED)


@pytest.mark.parametrize("spoiled", ["q", "dout"])
@pytest.mark.parametrize(
    "head_dim, deterministic",
    [(64, False), *(pytest.param(*x, marks=pytest.mark.thorough) for x in ((64, True), (136, False)))],
)
def test_keys_out_of_use_have_no_gradient_beside_nan(spoiled: str, head_dim: int, deterministic: bool) -> None:
    case = PackedProblem(
        (70, 5), (90, 9), heads=(2, 1), head_dims=(head_dim, head_dim), seqused_k=(33, 9), dtype="float16"
    )
    (q, *others), dout = case.arrays(), case.dout()
    {"q": q, "dout": dout}[spoiled][3] = np.nan
    with ring_on(Hopper()) as ring:
        _, vjp = ring.attention_varlen_vjp(q, *others, **ring.options(case), deterministic=deterministic)
        _, dk, dv = vjp(dout)
    for gradient in (dk, dv):
        assert np.isnan(gradient[0]).any()
        assert (gradient[33:90] == 0).all() and np.isfinite(gradient[90:]).all()


def test_a_mod_is_not_asked_where_there_are_no_keys() -> None:
    """Rows behind the last sequence, whose dQ is a kernel of its own: an index out of bounds ends the child."""
    q, k = np.ones((40, 1, 64), np.float16), np.ones((20, 1, 64), np.float16)
    offsets = np.array([0, 30], np.int32), np.array([0, 20], np.int32)
    mod = {
        "score_mod": "score + table(kv_idx < 0 ? -10000000000ll : kv_idx)",
        "mod_args": {"table": np.ones(20, np.float32)},
    }
    with ring_on(Hopper(isolated=True)) as ring:
        out, vjp = ring.attention_varlen_vjp(q, k, k, *offsets, deterministic=True, **mod)
        dq, _, _ = vjp(out)
    np.testing.assert_array_equal(dq[30:], 0)


@dataclass(frozen=True)
class Mutant:
    """A mistake: text that is replaced, as often as a file has it, and what brings it to light."""

    name: str
    path: str
    text: str
    replacement: str
    way: str
    case: AttentionProblem
    count: int = 1

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


MUTANTS = [
    Mutant("no wait for V", "kernels/fwd_sm90.cuh", "shared.rings.v.wait_full(v_at);", "", "lazy", CAUSAL, count=3),
    Mutant("Q is not given back", "kernels/bwd_sm90.cuh", "release(rings.q, at);", "", "forward", CAUSAL),
    Mutant(
        "no barrier before dS of both consumers is read",
        "kernels/bwd_sm90.cuh",
        "ptx::named_barrier_sync(kDsIsThere, 256);",
        "",
        "greedy",
        CAUSAL,
    ),
    Mutant(
        "rows of dS are turned by too little",
        "tile/swizzled_tile.cuh",
        "^ row % 8 * 16",
        "^ row % 4 * 16",
        "forward",
        CAUSAL,
    ),
    Mutant(
        "no wait until weights before were read",
        "kernels/bwd_sm90_dkdv_wide.cuh",
        "ptx::named_barrier_sync(kSlopesAreRead, 256);",
        "",
        "greedy",
        WIDE,
    ),
    Mutant(
        "one block of a cluster gets all tiles",
        "tile/swizzled_tile.cuh",
        "(1 << kCluster) - 1",
        "1",
        "forward",
        WITH_BIAS,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    cuda_src = seed_mistake(tmp_path, mutant.path, mutant.text, mutant.replacement, count=mutant.count)
    with (
        ring_on(Hopper(**WAYS[mutant.way], cuda_src=cuda_src, isolated=True, timeout=60)) as ring,
        pytest.raises((HostCudaError, AssertionError)) as error,
    ):
        ring.check_backward(mutant.case)
    assert not isinstance(error.value, CompileError), "a mutant that does not compile proves nothing"
