"""The sm90 family: which calls it takes, what the copy engine is told; on a Hopper, what only it can get wrong."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import _backends, _launch, _sm90, _sm90_backward, _sm90_block, _sm90_dq, _tensor_maps, _wgmma
from cuflash._device import Chip, KernelSource, Launch, TensorBox
from cuflash._kernel import HEAD_DIMS
from cuflash._launch import LaunchBackend
from cuflash._options import Options
from cuflash._problem import Operand, Problem, Window
from cuflash._wgmma import WIDTHS, wgmma
from cuflash.testing import (
    assert_attention_accurate,
    assert_attention_varlen_accurate,
    assert_gradients_accurate,
    assert_gradients_varlen_accurate,
    reference_attention_backward,
    reference_attention_varlen_backward,
)
from cuflash.testing.strategies import AttentionProblem, PackedProblem, PairArray
from tests import cubin
from tests.conftest import gpu_ring
from tests.test_compile import FEATURES

H200 = Chip("H200", (9, 0), 227 * 1024, 132)
BF16 = np.dtype(ml_dtypes.bfloat16)
TABLES: list[dict[tuple[int, int], tuple[_sm90_block.Tile, ...]]] = [
    table for name, table in vars(_sm90).items() if name.endswith("TILES")
]


@dataclass(eq=False)
class Notebook:
    """A device that writes down what it is asked for, and runs nothing."""

    chip: Chip = H200
    launches: list[tuple[KernelSource, int, tuple[Any, ...]]] = field(default_factory=list)
    maps: list[list[TensorBox]] = field(default_factory=list)
    workspaces: list[int] = field(default_factory=list)  # bytes
    null: int = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        array = np.empty(shape, dtype)
        self.workspaces.append(array.nbytes)
        return array

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pointer(self, array: np.ndarray[Any, Any]) -> int:
        return array.ctypes.data

    def struct(self, params: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return params

    def addresses(self, *arrays: np.ndarray[Any, Any]) -> tuple[int, ...]:
        return tuple(map(self.pointer, arrays))

    def tensor_maps(self, arrays: Sequence[TensorBox], dtype: str) -> bytes:
        self.maps.append(list(arrays))
        return bytes(128 * len(arrays))

    def counter(self) -> str:
        return "counter"

    def load(self, kernels: Sequence[KernelSource]) -> list[Launch]:
        return [partial(self._note, kernel) for kernel in kernels]

    def _note(self, kernel: KernelSource, num_blocks: int, arguments: tuple[Any, ...]) -> None:
        self.launches.append((kernel, num_blocks, arguments))

    @property
    def symbols(self) -> list[str]:
        return [kernel.symbol for kernel, _, _ in self.launches]

    @property
    def tile(self) -> tuple[int, ...]:
        """Head dimensions, rows and keys of the tile of the last kernel."""
        kernel, _, _ = self.launches[-1]
        (arguments,) = re.findall(r"cuflash::(?:Fwd|Bwd)Sm90\w*<(.*)>;", kernel.code)
        return tuple(map(int, arguments.split(", ")[2:6]))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    """An H200 that calls on NumPy arrays go to."""
    return put(monkeypatch, Notebook())


def put(monkeypatch: pytest.MonkeyPatch, device: Notebook) -> Notebook:
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(device))
    return device


def backward(q: Any, k: Any, v: Any, dout: Any = None, **options: Any) -> Any:
    """The gradients of a call in the layout bhsd; the device computes nothing, so any out and lse will do."""
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.zeros(q.shape[:-1], np.float32)
    return cuflash.attention_backward(out if dout is None else dout, q, k, v, out, lse, **options)


def arrays(seqlen: int = 64, head_dim: int = 64, head_dim_v: int = 0, dtype: Any = BF16) -> list[Any]:
    return [np.zeros((2, seqlen, dim), dtype) for dim in (head_dim, head_dim, head_dim_v or head_dim)]


# Which calls it takes


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[], tuple[list[Any], dict[str, Any]]]:
    """Make a call of which one array is not as usual."""

    def call() -> tuple[list[Any], dict[str, Any]]:
        inputs = dict(zip("qkv", arrays(), strict=True))
        inputs[name] = change(inputs[name])
        return [*inputs.values()], {}

    return call


def with_out(out: np.ndarray[Any, Any]) -> Callable[[], tuple[list[Any], dict[str, Any]]]:
    return lambda: (arrays(), {"out": out})


REFUSED: dict[str, tuple[Callable[[], tuple[list[Any], dict[str, Any]]], str]] = {
    "float32": (lambda: (arrays(dtype=np.float32), {}), "float16 and bfloat16, not float32"),
    "head_dim 12": (lambda: (arrays(head_dim=12), {}), "q: its rows do not begin at multiples of 16 bytes"),
    "head_dim_v 20": (lambda: (arrays(head_dim_v=20), {}), "v: its rows do not begin at multiples of 16 bytes"),
    "12 columns of 16": (changed("v", lambda v: v[..., :16][..., :12]), "v: its rows do not begin"),
    "strided columns": (
        changed("k", lambda k: np.repeat(k, 2, axis=2)[..., ::2]),
        "k: its last axis is not contiguous",
    ),
    "strided columns of out": (with_out(np.zeros((2, 64, 128), BF16)[..., ::2]), "out: its last axis"),
    "rows of 136 bytes": (changed("v", lambda v: np.pad(v, ((0, 0), (0, 0), (0, 4)))[..., :64]), "v: its rows"),
    "heads 8 bytes apart": (
        changed("q", lambda q: np.lib.stride_tricks.as_strided(q, q.shape, (8, 128, 2))),
        "q: its rows do not begin",
    ),
    "rows of out of 136 bytes": (with_out(np.zeros((2, 64, 68), BF16)[..., :64]), "out: its rows"),
    "backwards": (changed("k", lambda k: k[:, ::-1]), "k: its strides are negative"),
    "heads backwards": (changed("q", lambda q: q[::-1]), "q: its strides are negative"),
    "repeated rows": (changed("v", lambda v: np.broadcast_to(v[:, :1], v.shape)), "v: its strides .* repeat rows"),
    "negative scale": (lambda: (arrays(), {"scale": -0.5}), "scales from 1.18e-38, not -0.5"),
    "scale 0": (lambda: (arrays(), {"scale": 0.0}), "scales from 1.18e-38, not 0.0"),
    "tiny scale": (lambda: (arrays(), {"scale": 1e-40}), "scales from 1.18e-38, not 1e-40"),
    "no keys": (lambda: ([arrays()[0], *arrays(0)[1:]], {}), "at least one sequence, query and key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_goes_to_another_family(notebook: Notebook, name: str) -> None:
    """With the reason if sm90 was asked for by its name."""
    make, reason = REFUSED[name]
    inputs, options = make()
    with pytest.raises(NotImplementedError, match=f"kernel='sm90' cannot compute this call: sm90: .*{reason}"):
        cuflash.attention(*inputs, kernel="sm90", **options)
    assert notebook.launches == []
    cuflash.attention(*inputs, **options)
    family = "wmma" if "scale" in options else "sm80"
    assert [symbol[:16] for symbol in notebook.symbols] == [f"cuflash_fwd_{family}"]


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_an_array_at_an_odd_address(name: str) -> None:
    operand = Operand((1, 2, 64, 64), (8192, 4096, 64, 1), "bfloat16")
    operands = dict.fromkeys(("q", "k", "v", "out"), operand)
    problem = Problem("bfloat16", 1, 2, 2, 64, 64, 64, 64, 1.0)
    assert _sm90.why_not(problem, "bfloat16", H200, Options(), operands) is None
    operands[name] = operand._replace(aligned=False)
    reason = _sm90.why_not(problem, "bfloat16", H200, Options(), operands)
    assert reason == f"{name}: its rows do not begin at multiples of 16 bytes"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_chips(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    other = put(monkeypatch, Notebook(Chip("other", capability, 227 * 1024)))
    major, minor = capability
    with pytest.raises(NotImplementedError, match=rf"needs compute capability 9.0, other has {major}\.{minor}"):
        cuflash.attention(*arrays(), kernel="sm90")
    cuflash.attention(*arrays())
    assert other.symbols == ["cuflash_fwd_sm80_bf16_d64x64"]


FINISH = "_finish_without_sums"


def test_gradients_have_kernels_of_their_own(notebook: Notebook) -> None:
    q, k, v = arrays()
    delta, main, finish, dkdv, of_dq, finish_without_sums = (
        f"cuflash_bwd_{name}"
        for name in ("delta_bf16", *(f"sm90{part}_bf16_d64x64" for part in ("", "_finish", "_dkdv", "_dq", FINISH)))
    )
    for kernel in ("auto", "sm90"):
        backward(q, k, v, kernel=kernel)
        assert notebook.symbols[-3:] == [delta, main, finish]
    for kernel, causal in itertools.product(("auto", "sm90"), (False, True)):
        backward(q, k, v, kernel=kernel, causal=causal, deterministic=True)
        assert notebook.symbols[-4:] == [delta, dkdv, of_dq, finish_without_sums]


@pytest.mark.parametrize(("head_dims", "name"), [((64, 40), "d64x64"), ((64, 96), "d128x128")])
def test_gradients_of_other_widths_are_padded(notebook: Notebook, head_dims: tuple[int, int], name: str) -> None:
    backward(*arrays(64, *head_dims), kernel="sm90")
    assert notebook.symbols[-2:] == [f"cuflash_bwd_sm90_bf16_{name}", f"cuflash_bwd_sm90_finish_bf16_{name}"]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("head_dims", "name"), [((160, 128), "d192x128"), ((64, 136), "d192x192"), ((200, 64), "d256x256")]
)
def test_beyond_128_columns_dq_has_a_kernel_of_its_own(
    notebook: Notebook, head_dims: tuple[int, int], name: str, deterministic: bool
) -> None:
    """Whether it is asked for or not: the same kernels, and so the same bits in every run."""
    backward(*arrays(64, *head_dims), kernel="sm90", deterministic=deterministic)
    assert notebook.symbols[-3:] == [f"cuflash_bwd_sm90{part}_bf16_{name}" for part in ("_dkdv", "_dq", FINISH)]


@pytest.mark.parametrize("name", [*"qkv", "dout"])
def test_gradients_of_arrays_that_tma_cannot_read(notebook: Notebook, name: str) -> None:
    inputs = dict(zip(("q", "k", "v", "dout"), [*arrays(), arrays()[0]], strict=True))
    inputs[name] = np.repeat(inputs[name], 2, axis=2)[..., ::2]
    with pytest.raises(NotImplementedError, match=f"sm90: {name}: its last axis is not contiguous"):
        backward(**inputs, kernel="sm90")
    backward(**inputs)
    assert not any("sm90" in symbol for symbol in notebook.symbols)


def gradient_of_a_bias(notebook: Notebook, bias: tuple[int, ...], *inputs: Any, **options: Any) -> tuple[str, int]:
    """The kernel that computes it, and the number of its blocks."""
    backward(*inputs, bias=np.zeros(bias, BF16), return_dbias=True, **options)
    kernel, num_blocks, _ = notebook.launches[-1]
    assert (num_blocks % 2 == 0) or "__cluster_dims__" not in kernel.code
    return kernel.symbol, num_blocks


def test_the_gradient_of_a_bias_has_its_own_kernel_for_arrays_that_tma_reads(notebook: Notebook) -> None:
    q, k, v = arrays(512)
    by_tma, by_threads = ("cuflash_bwd_sm90_dbias_bf16_d64x64_bias", "cuflash_bwd_sm80_dbias_bf16_d64x64_bias")
    for kernel in ("auto", "sm90", "sm80", "wmma"):
        assert gradient_of_a_bias(notebook, (512, 512), q, k, v, kernel=kernel) == (by_tma, 16)
    assert gradient_of_a_bias(notebook, (1, 512), q, k, v)[0] == by_threads, "pairs of a tile share a row"
    assert gradient_of_a_bias(notebook, (512, 1), q, k, v)[0] == by_threads, "pairs of a tile share a column"
    strided = np.repeat(k, 2, axis=2)[..., ::2]
    assert gradient_of_a_bias(notebook, (512, 512), q, strided, v)[0] == by_threads


@pytest.mark.parametrize(
    ("keys", "causal", "blocks"), [(4096, False, 132), (16384, True, 2 * 65), (128, False, 64), (300, False, 132)]
)
def test_blocks_of_the_gradient_of_a_bias_stay(notebook: Notebook, keys: int, causal: bool, blocks: int) -> None:
    """Clusters of two where two blocks have keys; under a mask an odd number of them."""
    inputs = [arrays(4096)[0], *arrays(keys)[1:]]
    assert gradient_of_a_bias(notebook, (2, 4096, keys), *inputs, causal=causal)[1] == blocks
    assert ("__cluster_dims__(2)" in notebook.launches[-1][0].code) == (keys >= 4096)


TAKEN: dict[str, Callable[[], tuple[list[Any], dict[str, Any]]]] = {
    "float16": lambda: (arrays(dtype=np.float16), {}),
    "heads in common": changed("k", lambda k: np.broadcast_to(k[:1], k.shape)),
    "every second row": changed("v", lambda v: np.repeat(v, 2, axis=1)[:, ::2]),
    "a slice of the columns": changed("q", lambda q: np.pad(q, ((0, 0), (0, 0), (8, 24)))[..., 8:72]),
    "bshd": lambda: ([np.zeros((3, 64, 2, 72), BF16)] * 3, {"layout": "bshd"}),
    "odd lengths": lambda: ([arrays(1)[0], *arrays(77)[1:]], {"causal": "top-left", "window_size": (3, 2)}),
    "every option": lambda: (
        arrays(),
        {"softcap": 3.0, "dropout_p": 0.5, "seed": 1, "bias": np.zeros((64, 64), np.float32)}
        | {"mask": np.ones((64, 64), bool), "sinks": np.zeros(2, np.float32), "score_mod": "score + 1"},
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_it_takes(notebook: Notebook, name: str) -> None:
    inputs, options = TAKEN[name]()
    for kernel in ("sm90", "auto"):
        out, vjp = cuflash.attention_vjp(*inputs, kernel=kernel, **options)
        vjp(out)
    of_a_call = ["cuflash_fwd_sm90", "cuflash_bwd_delt", "cuflash_bwd_sm90", "cuflash_bwd_sm90"]
    assert [symbol[:16] for symbol in notebook.symbols] == 2 * of_a_call


# Tiles


@pytest.mark.parametrize(
    ("head_dims", "seqlen", "options", "expected"),
    [
        ((64, 64), 512, {}, (64, 64, 192, 128)),
        ((64, 64), 512, {"causal": True}, (64, 64, 128, 128)),
        ((64, 64), 4096, {"causal": True}, (64, 64, 192, 128)),
        ((64, 64), 512, {"window_size": (100, None)}, (64, 64, 128, 128)),
        ((64, 64), 512, {"softcap": 5.0}, (64, 64, 192, 128)),
        ((64, 64), 512, {"softcap": 5.0, "causal": True}, (64, 64, 128, 128)),
        ((64, 64), 512, {"dropout_p": 0.1, "seed": 1}, (64, 64, 192, 128)),
        ((64, 64), 512, {"dropout_p": 0.1, "seed": 1, "softcap": 5.0}, (64, 64, 192, 96)),
        ((64, 64), 512, {"score_mod": "score + 1"}, (64, 64, 192, 128)),
        ((64, 64), 512, {"dropout_p": 0.1, "seed": 1, "softcap": 5.0, "score_mod": "score + 1"}, (64, 64, 192, 96)),
        ((128, 128), 512, {"score_mod": "score + 1"}, (128, 128, 128, 128)),
        ((128, 128), 512, {"dropout_p": 0.1, "seed": 1, "softcap": 5.0, "score_mod": "score + 1"}, (128, 128, 128, 96)),
        ((160, 160), 512, {"dropout_p": 0.1, "seed": 1, "softcap": 5.0, "score_mod": "score + 1"}, (192, 192, 128, 64)),
        ((64, 64), 512, {"mask": np.ones((512, 512), bool)}, (64, 64, 192, 128)),
        ((64, 64), 512, {"bias": np.zeros((512, 512), BF16)}, (64, 64, 192, 128)),
        ((64, 64), 512, {"bias": np.zeros((512, 512), BF16), "softcap": 5.0}, (64, 64, 128, 128)),
        ((8, 40), 512, {}, (64, 64, 192, 128)),
        ((72, 64), 512, {}, (96, 96, 128, 128)),
        ((128, 128), 512, {}, (128, 128, 128, 128)),
        ((192, 128), 512, {}, (192, 128, 128, 128)),
        ((160, 160), 512, {}, (192, 192, 128, 96)),
        ((256, 256), 512, {}, (256, 256, 128, 64)),
    ],
)
def test_the_tile_of_a_call(
    notebook: Notebook, head_dims: tuple[int, int], seqlen: int, options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    cuflash.attention(*arrays(seqlen, *head_dims), **options)
    assert notebook.tile == expected


def combinations() -> list[Options]:
    """Every set of options, the scores' arrays in float32 too."""
    made = []
    problem = Problem("bfloat16", 1, 1, 1, 64, 64, 1, 1, 1.0)
    for count in range(len(FEATURES) + 1):
        for names in itertools.combinations(FEATURES, count):
            if {"score_mod", "mask_mod"} <= {*names} or ("packed" in names and {"bias", "mask"} & {*names}):
                continue
            chosen = [FEATURES[name] for name in names]
            changes = {key: value for changes, _ in chosen for key, value in changes.items()}
            operands = {key: value for _, found in chosen for key, value in found.items()}
            made.append(Options.of(replace(problem, **changes), operands))
            if "bias" in names:
                operands["bias"] = operands["bias"]._replace(dtype="float32")
                made.append(Options.of(replace(problem, **changes), operands))
    return made


def test_every_set_of_options_has_a_tile_and_every_tile_a_call() -> None:
    used = set()
    for head_dims, options, causal in itertools.product(HEAD_DIMS, combinations(), (False, True)):
        problem = Problem("bfloat16", 1, 1, 1, 64, 64, *head_dims, 1.0, window=Window.of(causal, None))
        problem = replace(problem, packed="packed" in options.names)
        assert _sm90.why_not(problem, "bfloat16", H200, options) is None
        kernel, tile, _ = _sm90.forward(problem, options, "bfloat16", H200)
        assert kernel.shared_bytes <= H200.shared_memory
        used.add((_sm90._dims(problem), tile))
    assert used == {(dims, tile) for table in TABLES for dims, tiles in table.items() for tile in tiles}


def test_every_set_of_options_has_a_tile_for_its_gradients_and_every_tile_a_call() -> None:
    used = set()
    for head_dims, options, deterministic in itertools.product(_sm90_backward.TILES, combinations(), (False, True)):
        problem = Problem("bfloat16", 1, 1, 1, 64, 64, *head_dims, 1.0, packed="packed" in options.names)
        assert _sm90.why_no_backward(problem, H200, options) is None
        made = _sm90_backward.kernels(problem, options, "bfloat16", H200, deterministic=deterministic)
        assert max(made.main.shared_bytes, made.finish.shared_bytes) <= H200.shared_memory
        used.add((head_dims, made.tile))
    assert used == {(dims, tile) for dims, tiles in _sm90_backward.TILES.items() for tile in tiles}


def test_every_set_of_options_has_a_tile_for_dq_and_every_tile_a_call() -> None:
    used = set()
    for head_dims, options in itertools.product(_sm90_dq.TILES, combinations()):
        kernel, tile = _sm90_dq.kernel(head_dims, options, "bfloat16", H200)
        assert kernel.shared_bytes <= H200.shared_memory
        used.add((head_dims, tile))
    assert used == {(dims, tile) for dims, tiles in _sm90_dq.TILES.items() for tile in tiles}


@pytest.mark.parametrize(
    ("heads", "heads_kv", "seqlen", "jobs"),
    [(1, 1, 128, (1, 1)), (1, 1, 129, (2, 2)), (6, 2, 300, (6, 18)), (16, 8, 4096, (256, 512))],
)
def test_the_blocks_of_a_backward(
    notebook: Notebook, heads: int, heads_kv: int, seqlen: int, jobs: tuple[int, int]
) -> None:
    """One for each tile of keys, or of queries, but no more than there are multiprocessors.

    At last one for each tile of queries, and one for eight of keys.
    """
    q, k = (np.zeros((n, seqlen, 64), BF16) for n in (heads, heads_kv))
    backward(q, k, k, deterministic=True)
    of_keys, of_queries = jobs
    assert [num_blocks for _, num_blocks, _ in notebook.launches[1:]] == [
        min(of_keys, 132),
        min(of_queries, 132),
        of_queries + -(-of_keys // 8),
    ]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_workspace_of_a_backward_is_linear(notebook: Notebook, head_dim: int, deterministic: bool) -> None:
    """Float32 sums of dq, unless it has a kernel of its own; delta, lse, and a word a tile (docs/kernels.md)."""
    has_sums = head_dim <= 128 and not deterministic
    for seqlen in (1024, 8192):
        q, k, v = arrays(seqlen, head_dim)
        backward(q, k, v, deterministic=deterministic)
        least = 4 * q.size * has_sums + 2 * 4 * q.size // head_dim
        assert least <= notebook.workspaces[-1] <= least + 2 * (seqlen // 64 + seqlen // 128) * 4


@pytest.mark.parametrize(
    ("shape", "blocks"), [((1, 1, 192), 1), ((1, 1, 193), 2), ((2, 3, 100), 6), ((4, 32, 4096), 132)]
)
def test_there_are_as_many_blocks_as_jobs_and_multiprocessors(
    notebook: Notebook, shape: tuple[int, int, int], blocks: int
) -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros((1, 64), BF16), (*shape, 64), (128, 128, 128, 2))
    q = np.lib.stride_tricks.as_strided(x, x.shape, (128, 128, 128, 2))
    cuflash.attention(q, q, q)
    assert notebook.launches[-1][1] == blocks


# What the copy engine is told


@st.composite
def laid_out(draw: st.DrawFn, batch: int, heads: int, rows: int, cols: int, layout: str) -> np.ndarray[Any, Any]:
    """Draw an array of a call: a slice of a larger one, perhaps the same for all heads or the whole batch."""
    sizes = [1 if draw(st.integers(0, 3)) == 0 else batch, 1 if draw(st.integers(0, 3)) == 0 else heads, rows]
    steps = [draw(st.integers(1, 2)) for _ in sizes]
    memory = [size * step for size, step in zip(sizes, steps, strict=True)]
    order = draw(st.permutations(range(3)))
    base = np.zeros((*(memory[axis] for axis in order), cols + 8 * draw(st.integers(0, 2))), np.float16)
    x = base.transpose(*np.argsort(order), 3)[:: steps[0], :: steps[1], :: steps[2], :cols]
    x = np.broadcast_to(x, (batch, heads, rows, cols))
    return x.transpose(0, 2, 1, 3) if layout == "bshd" else x


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, np.ndarray[Any, Any]], str]:
    layout = draw(st.sampled_from(["bhsd", "bshd"]))
    batch, heads_kv, group = (draw(st.integers(1, 3)) for _ in range(3))
    seqlen_q, seqlen_k = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    head_dim, head_dim_v = (8 * draw(st.integers(1, 12)) for _ in range(2))
    return {
        "q": draw(laid_out(batch, heads_kv * group, seqlen_q, head_dim, layout)),
        "k": draw(laid_out(batch, heads_kv, seqlen_k, head_dim, layout)),
        "v": draw(laid_out(batch, heads_kv, seqlen_k, head_dim_v, layout)),
        "dout": draw(laid_out(batch, heads_kv * group, seqlen_q, head_dim_v, layout)),
    }, layout


@pytest.mark.parametrize("op", ["forward", "backward"])
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_the_boxes_hold_what_the_kernel_asks_for(op: str, call: tuple[dict[str, np.ndarray[Any, Any]], str]) -> None:
    inputs, layout = call
    q, k, v, dout = inputs.values()
    with pytest.MonkeyPatch.context() as patch:
        notebook = put(patch, Notebook())
        patch.setattr(_launch, "heads_as_rows", lambda *call: call)  # each head is to be its own
        if op == "forward":
            del inputs["dout"]
            cuflash.attention(q, k, v, layout=layout, kernel="sm90")
        else:
            lse = np.zeros(dout.transpose(0, 2, 1, 3).shape[:3] if layout == "bshd" else dout.shape[:3], np.float32)
            cuflash.attention_backward(
                dout, q, k, v, np.zeros(dout.shape, dout.dtype), lse, layout=layout, kernel="sm90"
            )
    (maps,) = notebook.maps
    (params,) = (arguments[-1][0] for kernel, _, arguments in notebook.launches if "maps" in arguments[-1].dtype.names)
    block_m, block_n = notebook.tile[2:]
    rows = {"q": block_m, "k": block_n, "v": block_n, "dout": block_m}
    for (name, x), (address, shape, strides, box) in zip(inputs.items(), maps, strict=True):
        x = x.transpose(0, 2, 1, 3) if layout == "bshd" else x
        # What the driver asks for: cuTensorMapEncodeTiled in the documentation of the driver API.
        assert address == x.ctypes.data == params[name]
        assert all(0 < stride < 2**39 and stride % 8 == 0 for stride in strides)
        assert all(0 < size <= 2**32 for size in shape)
        assert box == (64, rows[name])
        # Rows and columns behind the array are its own to fill with zeros, and it knows of no memory but the array's.
        assert shape[:2] == (x.shape[3], x.shape[2])
        last = np.dot(strides, np.subtract(shape[1:], 1)) + shape[0]
        assert address + 2 * last == np.lib.array_utils.byte_bounds(x)[1]
        steps = params["fwd" if op == "forward" else "bwd"][name]
        for batch, head in np.ndindex(x.shape[:2]):
            along = (head if steps["head"] else 0, batch if steps["batch"] else 0)
            assert along[0] < shape[2]
            assert along[1] < shape[3]
            for row in (0, x.shape[2] - 1):
                offset = np.dot(strides, (row, *along))
                assert address + 2 * offset == x[batch, head, row].__array_interface__["data"][0]


def test_maps_are_made_once_for_the_same_arrays(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensor_maps, "MAX_KEPT", 3)
    sets = [arrays() for _ in range(4)]
    for inputs in (*sets[:3], *sets[:3]):
        cuflash.attention(*inputs)
    assert len(notebook.maps) == 3
    assert [[address for address, *_ in maps] for maps in notebook.maps] == [
        [x.ctypes.data for x in inputs] for inputs in sets[:3]
    ]
    cuflash.attention(*sets[3])  # they are dropped before they become too many
    cuflash.attention(*sets[3])
    assert len(notebook.maps) == 4


def test_packed_sequences_are_one_array(notebook: Notebook) -> None:
    q = np.zeros((300, 2, 64), BF16)
    cu_seqlens = np.array([0, 100, 300], np.int32)
    cuflash.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, kernel="sm90")
    assert [(shape, strides) for _, shape, strides, _ in notebook.maps[0]] == [((64, 300, 2, 1), (128, 64, 8))] * 3


# The instructions


@pytest.mark.parametrize("number", ["float16", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_an_instruction_names_each_register_once(number: str, width: int) -> None:
    code = wgmma(number, width)
    assert code.count("wgmma.mma_async") == 2
    functions = re.split("template <bool.*>", code)[1:]
    assert len(functions) == 2
    for function in functions:
        (sums,) = re.findall(r'"\{((?:%\d+, )*%\d+)\},', function)
        assert sums.split(", ") == [f"%{i}" for i in range(width // 2)]
        assert re.findall(r'"\+f"\(sum\[(\d+)\]\)', function) == [str(i) for i in range(width // 2)]
        named = {int(i) for i in re.findall(r"%(\d+)", function)}
        assert named == set(range(len(re.findall(r'"[+a-z]+"\(', function)))), "as many as there are operands"


@pytest.mark.parametrize("width", [0, 4, 60, 264, -8])
def test_a_width_that_no_instruction_has(width: int) -> None:
    with pytest.raises(ValueError, match=f"width: {width} is no multiple of 8 up to 256"):
        wgmma("float16", width)


# Each kind of factor, for each width.
USES = """\
#include <cuflash/ptx/wgmma.cuh>
#include <cuflash/common/numbers.cuh>
{definitions}
extern "C" __global__ void uses(float* out, cuflash::ptx::TileDescriptor a, cuflash::ptx::TileDescriptor b) {{
  using namespace cuflash;
  const unsigned rows[4] = {{threadIdx.x, 1, 2, 3}};
{statements}
}}
"""
USE = """\
  {{
    float sum[{size}] = {{}};
    ptx::wgmma_fence();
    ptx::Wgmma<{element}, {width}>::multiply<false, true>(sum, a, b, false);
    ptx::Wgmma<{element}, {width}>::multiply<true, false>(sum, a, b, true);
    ptx::Wgmma<{element}, {width}>::multiply<true>(sum, rows, b, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (float x : sum) *out++ = x;
  }}
"""


@pytest.mark.compile
@pytest.mark.parametrize(
    ("number", "element", "widths"),
    [
        ("float16", "__half", (32, 256)),
        ("bfloat16", "__nv_bfloat16", WIDTHS[3::4]),  # 32, 64 and so on: what kernels use
        pytest.param("bfloat16", "__nv_bfloat16", WIDTHS, marks=pytest.mark.thorough),
    ],
)
def test_every_instruction_compiles(number: str, element: str, widths: Sequence[int]) -> None:
    pytest.importorskip("cupy")
    uses = "".join(USE.format(size=width // 2, element=element, width=width) for width in widths)
    code = USES.format(definitions="".join(wgmma(number, width) for width in widths), statements=uses)
    binary, _ = cubin.compile_for(KernelSource("uses", code, 128, 0, _wgmma.ARCH), "sm_90")
    assert cubin.opcodes(cubin.disassembled(binary))["HGMMA"] == 3 * len(widths)


# The counters of its jobs


class FakeCupy:
    """As much of CuPy as counters need: a current stream, and whether it is being captured."""

    def __init__(self) -> None:
        self.stream, self.capturing, self.allocated = 1, False, 0
        self.generation = 0  # of streams at the same addresses
        runtime = SimpleNamespace(streamIsCapturing=lambda stream: self.capturing and stream == self.stream)
        side = SimpleNamespace(synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            get_current_stream=lambda: SimpleNamespace(ptr=self.stream),
            runtime=runtime,
            Stream=lambda non_blocking: nullcontext(side),
        )
        self.uint32 = np.uint32

    def zeros(self, size: int, dtype: Any) -> Any:
        self.allocated += 1
        return SimpleNamespace(size=size, data=SimpleNamespace(ptr=self.allocated << 20))


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    pytest.importorskip("cupy")
    from cuflash import _cupy

    fake = FakeCupy()
    monkeypatch.setattr(_cupy, "cupy", fake)
    monkeypatch.setattr(_cupy, "stream_id", lambda stream: 10 * fake.generation + stream)
    return fake


@pytest.fixture
def counters(fake_cupy: FakeCupy) -> Any:
    from cuflash._cupy import Counters

    return Counters()


def test_a_stream_keeps_its_counter_and_shares_it_with_nobody(fake_cupy: FakeCupy, counters: Any) -> None:
    first = {}
    for stream in range(3000):  # more than one piece of memory has room for
        fake_cupy.stream = stream
        first[stream] = counters.next()
    assert len(set(first.values())) == 3000
    assert all(int(address) % 4 == 0 for address in first.values())
    for stream in (0, 2999, 17):
        fake_cupy.stream = stream
        assert counters.next() == first[stream]


def test_a_captured_launch_has_a_counter_of_its_own(fake_cupy: FakeCupy, counters: Any) -> None:
    eager = counters.next()
    fake_cupy.capturing = True
    captured = [counters.next() for _ in range(5)]
    fake_cupy.capturing = False
    assert counters.next() == eager
    assert len({eager, *captured}) == 6


def test_a_stream_at_the_address_of_a_destroyed_one_has_another_counter(fake_cupy: FakeCupy, counters: Any) -> None:
    before = counters.next()
    fake_cupy.generation += 1
    assert counters.next() != before


def test_counters_of_many_streams_are_forgotten_not_used_twice(fake_cupy: FakeCupy, counters: Any) -> None:
    from cuflash._cupy import MAX_STREAMS

    addresses = set()
    for stream in range(MAX_STREAMS + 10):
        fake_cupy.stream = stream
        addresses.add(int(counters.next()))
    assert len(addresses) == MAX_STREAMS + 10


# On a Hopper


@pytest.fixture
def hopper(gpu: Any) -> Any:
    """CuPy, where the GPU is a Hopper."""
    if gpu.cuda.Device().compute_capability != "90":
        pytest.skip("needs a GPU of compute capability 9.0")
    return gpu


def normal(cupy: Any, shape: tuple[int, ...], seed: int) -> Any:
    return cupy.random.default_rng(seed).standard_normal(shape, dtype=cupy.float32).astype("bfloat16")


def inputs_of(cupy: Any, seqlen: int, head_dim: int, heads: int = 4) -> list[Any]:
    return [normal(cupy, (2, heads, seqlen, head_dim), seed) for seed in range(3)]


def bits(x: Any) -> Any:
    return x.view(f"uint{8 * x.itemsize}")


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (20, 5)}, {"mask": PairArray((300, 400), hidden=0.5)}, {"dropout_p": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_rows_that_do_not_see_nan_are_as_without_it(
    hopper: Any, options: dict[str, Any], head_dim: int, name: str, value: float
) -> None:
    """In the last tile of keys and in the middle; the reference decides what is NaN, and what is not."""
    ring = gpu_ring("sm90")
    kv = (1, 400, head_dim)
    problem = AttentionProblem((2, 300, head_dim), kv, kv, "bfloat16", **options)
    arrays = dict(zip("qkv", problem.arrays(), strict=True))
    clean = ring.attention(*map(ring.asarray, arrays.values()), **ring.options(problem))
    arrays[name][0, 205, 3] = arrays[name][0, 390, 5] = value
    out, lse = ring.attention(*map(ring.asarray, arrays.values()), return_lse=True, **ring.options(problem))
    assert_attention_accurate(*arrays.values(), out, lse, **problem.options)
    if "causal" in options:  # row 104 is the last that does not see key 205, and the row before it is in its tile
        out, clean = out.astype("float32"), clean.astype("float32")
        assert float(abs(out[:, :105] - clean[:, :105]).max()) < 0.02
        assert not bool(hopper.isfinite(out[:, 105:]).all())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"bias": PairArray((3, 832, 300))},
        {"bias": PairArray((2, 1, 832, 300), dtype="float32")},
        {"mask": PairArray((832, 300), hidden=0.3)},
        {"mask_mod": "document", "block_mask": True},
        {"mask_mod": "document", "block_mask": True, "bias": PairArray((832, 300)), "causal": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tile_of_queries_is_computed(hopper: Any, options: dict[str, Any], head_dim: int) -> None:
    """Few rows are in the last of a head: then those of all heads come last. Heads that share a bias come together."""
    kv = (2, 1, 300, head_dim)
    gpu_ring("sm90").check_forward(AttentionProblem((2, 3, 832, head_dim), kv, kv, "bfloat16", **options))


@pytest.mark.gpu
@pytest.mark.parametrize("step", [8, -8])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_grow_from_tile_to_tile(hopper: Any, head_dim: int, options: dict[str, Any], step: int) -> None:
    """Then what the sums are based on must follow, in whichever order tiles come; lanes vote whether it must."""
    q, k, v = inputs_of(hopper, 700, head_dim)
    q[..., 0] = 8
    k[..., 0] = hopper.arange(700) // 128 * step * math.sqrt(head_dim) / 8
    out, lse = cuflash.attention(q, k, v, return_lse=True, kernel="sm90", **options)
    assert_attention_accurate(q, k, v, out, lse, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_sequences_do_not_see_their_neighbours(hopper: Any, head_dim: int) -> None:
    """All rows behind a sequence, and the keys that are not used, are NaN in one call and sound in the other."""
    ring = gpu_ring("sm90")
    problem = PackedProblem(
        lengths_q=(30, 200, 1, 129),
        lengths_k=(90, 5, 0, 260),
        seqused_k=(65, 5, 0, 131),
        heads=(2, 1),
        head_dims=(head_dim, head_dim),
        tails=(7, 9),
        dtype="bfloat16",
        causal=True,
    )
    out, lse = ring.attention_varlen(*problem.arrays(hopper), return_lse=True, **ring.options(problem))
    assert_attention_varlen_accurate(*problem.arrays(), out, lse, **problem.options)
    assert not hopper.isnan(out.astype("float32")).any()


Problems = AttentionProblem | PackedProblem


def gradients_of(problem: Problems, inputs: dict[str, Any], *, deterministic: bool = False) -> dict[str, Any]:
    """The gradients of a problem with these inputs, on NumPy's side, by name."""
    ring = gpu_ring("sm90")
    packed, options = isinstance(problem, PackedProblem), ring.options(problem)
    of_options = [name for name in ("bias", "sinks") if name in options]
    asked = {f"return_d{name}": True for name in of_options}
    dout, *others = map(ring.asarray, inputs.values())
    of_vjp = ring.attention_varlen_vjp if packed else ring.attention_vjp
    _, vjp = of_vjp(*others, **options, **asked, deterministic=deterministic)
    results = vjp(dout, problem.dlse(ring.xp))
    return {f"d{name}": ring.numpy(x) for name, x in zip([*"qkv", *of_options], results, strict=True)}


def inputs_by_name(problem: Problems) -> dict[str, Any]:
    names = ("dout", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    return dict(zip(names, (problem.dout(), *problem.arrays()), strict=False))


def assert_right(problem: Problems, inputs: dict[str, Any], gradients: dict[str, Any]) -> None:
    packed = isinstance(problem, PackedProblem)
    assert_accurate = assert_gradients_varlen_accurate if packed else assert_gradients_accurate
    (dq, dk, dv), of_options = [*gradients.values()][:3], dict([*gradients.items()][3:])
    assert_accurate(*inputs.values(), dq, dk, dv, **problem.options, dlse=problem.dlse(), **of_options)


def expected_gradients(problem: Problems, inputs: dict[str, Any]) -> dict[str, Any]:
    packed = isinstance(problem, PackedProblem)
    reference = reference_attention_varlen_backward if packed else reference_attention_backward
    return dict(zip(("dq", "dk", "dv"), reference(*inputs.values(), **problem.options), strict=True))


# Several tiles of keys add to each dq, and several of queries to each dk; rows and keys that fill no tile.
LONG: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": "top-left"},
    "window": {"window_size": (150, 40)},
    "mask": {"mask": PairArray((300, 400), hidden=0.5)},
    "dropout": {"dropout_p": 0.5},
}


def long(head_dim: int, head_dim_v: int = 0, dtype: str = "bfloat16", **options: Any) -> AttentionProblem:
    kv = (2, 400)
    return AttentionProblem((4, 300, head_dim), (*kv, head_dim), (*kv, head_dim_v or head_dim), dtype, **options)


PACKED = PackedProblem(
    lengths_q=(30, 0, 200, 1, 129, 300, 0),
    lengths_k=(90, 5, 300, 0, 260, 17, 0),
    heads=(4, 2),
    tails=(7, 9),
    dtype="bfloat16",
)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "deterministic"), [("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(
    "head_dims", [(64, 64), (128, 128), (8, 40), (64, 128), (128, 96), (256, 256), (192, 192), (192, 128)]
)
def test_gradients_of_many_tiles_are_accurate(
    hopper: Any, head_dims: tuple[int, int], name: str, dtype: str, deterministic: bool
) -> None:
    problem = long(*head_dims, dtype=dtype, **LONG[name])
    inputs = inputs_by_name(problem)
    assert_right(problem, inputs, gradients_of(problem, inputs, deterministic=deterministic))


GRADIENTS_OF_OPTIONS: dict[str, dict[str, Any]] = {
    "dlse": {"with_dlse": True, "causal": True},
    "sinks": {"sinks": "float32", "causal": True},
    "sinks and dlse": {"sinks": "bfloat16", "with_dlse": True, "window_size": (150, 40)},
    "bias": {"bias": PairArray((4, 300, 400)), "with_dlse": True},
    "bias of keys": {"bias": PairArray((1, 400), dtype="float32"), "causal": True},
    "bias and mask": {"bias": PairArray((300, 400), dtype="float32"), "mask": PairArray((4, 300, 400), hidden=0.3)},
    "softcap": {"softcap": 5.0, "alibi": "heads", "sinks": "float32"},
    "score_mod": {"score_mod": "table", "with_dlse": True},
    "mask_mod": {"mask_mod": "document", "block_mask": True, "sinks": "float32"},
    "dropout": {"dropout_p": 0.2, "bias": PairArray((300, 1)), "sinks": "float32", "causal": True, "with_dlse": True},
    "dropout alone": {"dropout_p": 0.7},
    "dropout and blocks": {"dropout_p": 0.2, "mask_mod": "document", "block_mask": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", GRADIENTS_OF_OPTIONS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_of_options_are_accurate(hopper: Any, head_dim: int, name: str, deterministic: bool) -> None:
    problem = long(head_dim, **GRADIENTS_OF_OPTIONS[name])
    inputs = inputs_by_name(problem)
    assert_right(problem, inputs, gradients_of(problem, inputs, deterministic=deterministic))


@pytest.mark.gpu
@pytest.mark.parametrize("alibi", [None, "heads"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_gradient_of_a_bias_where_a_block_of_a_cluster_has_no_keys(hopper: Any, head_dim: int, alibi: Any) -> None:
    """Of the last 256 columns there are 76, so that the second block has none; and rows fill no tile."""
    kv = (2, 1100, head_dim)
    problem = AttentionProblem((4, 70, head_dim), kv, kv, "bfloat16", bias=PairArray((4, 70, 1100)), alibi=alibi)
    inputs = inputs_by_name(problem)
    assert_right(problem, inputs, gradients_of(problem, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqused_k", [None, (65, 5, 131, 0, 131, 0, 0)])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 20)}, {"sinks": "float32"}, {"dropout_p": 0.2}], ids=str
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_of_packed_sequences_are_accurate(
    hopper: Any, head_dim: int, options: dict[str, Any], seqused_k: Any, deterministic: bool
) -> None:
    """Of which some have no queries, or no keys; what belongs to none, and keys that are not used, are NaN."""
    problem = replace(PACKED, head_dims=(head_dim, head_dim), seqused_k=seqused_k, with_dlse=True, **options)
    inputs = inputs_by_name(problem)
    assert_right(problem, inputs, gradients_of(problem, inputs, deterministic=deterministic))


# What is put into which rows of queries or of keys, in two tiles: causal masks show others the infinity alone.
QUERIES, KEYS = {70: math.nan, 200: math.inf}, {205: math.inf, 390: math.nan}
POISONED = {"q": QUERIES, "k": KEYS, "v": KEYS, "dout": QUERIES}


@pytest.mark.gpu
@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("options", [name for name in LONG if name != "full"] + ["packed", "packed causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_beside_nan_are_as_without_it(hopper: Any, head_dim: int, options: str, name: str) -> None:
    """The reference says which gradients a value takes part in: those are like its own, all others stay."""
    problem: Problems = long(head_dim, **LONG.get(options, {}))
    if "packed" in options:  # other sequences meet it in the tiles at the ends of their own
        problem = replace(PACKED, head_dims=(head_dim, head_dim), causal="causal" in options)
    inputs = inputs_by_name(problem)
    clean, expected = gradients_of(problem, inputs), expected_gradients(problem, inputs)
    for row, value in POISONED[name].items():
        where = (row, 1, 3) if "packed" in options else (1, row, 3)
        inputs[name][where] = value
    poisoned, expected_poisoned = gradients_of(problem, inputs), expected_gradients(problem, inputs)
    assert_right(problem, inputs, poisoned)
    num_beside = num_changed = 0
    for gradient, before in expected.items():
        scale = np.abs(before, where=np.isfinite(before), out=np.zeros_like(before)).max()
        beside = np.isclose(expected_poisoned[gradient], before, rtol=0, atol=1e-9 * scale)
        change = poisoned[gradient].astype(np.float64) - clean[gradient].astype(np.float64)
        assert np.abs(change[beside]).max(initial=0) <= 2 * 2.0**-8 * scale, gradient
        num_beside += beside[:, 1].sum() if "packed" in options else beside[1].sum()
        num_changed += (~beside).sum()
    assert num_beside > 0
    assert num_changed > 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0, "window_size": (700, 10)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_gradients_agree_with_those_of_wmma(hopper: Any, head_dim: int, options: dict[str, Any]) -> None:
    """With more jobs than multiprocessors, and heads in groups."""
    q, k, v = inputs_of(hopper, 2500, head_dim, heads=12)
    k, v = k[:, :6], v[:, :6]
    dout = normal(hopper, q.shape, 3)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    of_families = [
        cuflash.attention_backward(dout, q, k, v, out, lse, kernel=kernel, **options) for kernel in ("sm90", "wmma")
    ]
    for gradient, other in zip(*of_families, strict=True):
        gradient, other = gradient.astype("float32"), other.astype("float32")
        assert float(abs(gradient - other).max()) <= 2.0**-6 * float(abs(other).max())


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_captured_backward_is_right_each_time(hopper: Any, deterministic: bool) -> None:
    """What it adds to, and counts with, is 0 at the beginning of every replay."""
    q, k, v, dout = (normal(hopper, (2, 4, 300, 64), seed) for seed in range(4))
    stream = hopper.cuda.Stream(non_blocking=True)
    hopper.cuda.Device().synchronize()
    options = {"causal": True, "kernel": "sm90"}

    def step() -> Any:
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        return cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=deterministic, **options)

    with stream:
        warm = step()  # compiles the kernels, and leaves memory in the stream's pool
        stream.synchronize()
        del warm
        stream.begin_capture()
        captured = step()
        graph = stream.end_capture()
        for first_seed in (10, 20):
            for seed, x in enumerate((q, k, v, dout), start=first_seed):
                x[...] = normal(hopper, x.shape, seed)
            for x in captured:
                bits(x).fill(0xFFFF)
            graph.launch(stream)
            stream.synchronize()
            assert_gradients_accurate(dout, q, k, v, *captured, causal=True)


RACES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "dropout": {"causal": True, "dropout_p": 0.2, "seed": 7},
    "packed": {"causal": True},
}


def racing(cupy: Any, name: str, head_dim: int, op: str) -> Callable[[], tuple[Any, ...]]:
    """A call whose results must be the same bits each time."""
    seqlen, heads = 517, 24
    q, k, v = inputs_of(cupy, seqlen, head_dim, heads)
    k, v, dout = k[:, :8], v[:, :8], normal(cupy, q.shape, 3)
    forward: Any = cuflash.attention
    gradients: Any = cuflash.attention_backward
    cu_seqlens = ()
    if name == "packed":
        q, k, v, dout = (x.transpose(0, 2, 1, 3).reshape(2 * seqlen, -1, head_dim) for x in (q, k, v, dout))
        cu_seqlens = (cupy.asarray([0, 1, 300, 300, 980, 2 * seqlen], "int32"),) * 2
        forward, gradients = cuflash.attention_varlen, cuflash.attention_varlen_backward
    options = {"kernel": "sm90", **RACES.get(name, {})}
    if name == "bias":
        options["bias"] = normal(cupy, (heads, seqlen, seqlen), 5)
    if op == "forward":
        return lambda: (forward(q, k, v, *cu_seqlens, **options),)
    out, lse = forward(q, k, v, *cu_seqlens, return_lse=True, **options)
    inputs = dout, q, k, v, out, lse, *cu_seqlens
    if op == "deterministic backward":
        return lambda: gradients(*inputs, deterministic=True, **options)
    return lambda: gradients(*inputs, **options)[1:]  # only the sums of dq have no order


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["forward", "backward", "deterministic backward"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", [*RACES, "bias"])
def test_500_repetitions_give_the_same_bits(hopper: Any, name: str, head_dim: int, op: str) -> None:
    """Races show as differences; other work on a second stream shuffles the order of jobs."""
    call = racing(hopper, name, head_dim, op)
    noise = hopper.ones((512, 512), "float32")
    other = hopper.cuda.Stream(non_blocking=True)
    first = [bits(x) for x in call()]
    differing = hopper.zeros((), "int64")
    for _ in range(500):
        with other:
            noise @ noise
        for x, expected in zip(call(), first, strict=True):
            differing += (bits(x) != expected).sum()
    assert int(differing) == 0


@pytest.mark.gpu
def test_two_streams_and_a_graph_at_once(hopper: Any) -> None:
    """Each launch counts its jobs by itself, also where several run side by side."""
    calls = [inputs_of(hopper, seqlen, 64, heads=12) for seqlen in (700, 300, 500)]
    expected = [cuflash.attention(*inputs, causal=True, kernel="sm90") for inputs in calls]
    streams = [hopper.cuda.Stream(non_blocking=True) for _ in calls]
    hopper.cuda.Device().synchronize()
    outs = [hopper.empty_like(out) for out in expected]

    def call(number: int) -> None:
        cuflash.attention(*calls[number], causal=True, kernel="sm90", out=outs[number])

    with streams[2]:
        call(2)
        streams[2].synchronize()
        streams[2].begin_capture()
        call(2)
        call(2)
        graph = streams[2].end_capture()
    wrong = [hopper.zeros((), "int64") for _ in calls]
    for stream in streams:
        stream.synchronize()
    for _ in range(100):
        for number, stream in enumerate(streams):
            with stream:
                bits(outs[number]).fill(0xFFFF)
                if number == 2:
                    graph.launch(stream)
                else:
                    call(number)
                wrong[number] += (bits(outs[number]) != bits(expected[number])).sum()
        with streams[0]:
            graph.launch(streams[0])  # on another stream, too; a graph never runs beside itself
        hopper.cuda.Device().synchronize()
    assert [int(count) for count in wrong] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0, "window_size": (200, 10)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_it_agrees_with_wmma(hopper: Any, head_dim: int, options: dict[str, Any]) -> None:
    inputs = inputs_of(hopper, 777, head_dim)
    (out, lse), (other, other_lse) = (
        cuflash.attention(*inputs, kernel=kernel, return_lse=True, **options) for kernel in ("sm90", "wmma")
    )
    out, other = out.astype("float32"), other.astype("float32")
    assert bool((abs(out - other) <= 0.02 + abs(other) * 2**-7).all())
    assert float(abs(lse - other_lse).max()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_an_array_at_an_odd_address_is_computed_by_another_family(hopper: Any, name: str) -> None:
    problem = AttentionProblem((2, 129, 64), (2, 200, 64), (2, 200, 64), "bfloat16")
    arrays = dict(zip("qkv", problem.arrays(hopper), strict=True))
    arrays["out"] = hopper.empty(problem.q, "bfloat16")
    memory = hopper.empty(arrays[name].size + 1, "bfloat16")
    odd = memory[1:].reshape(arrays[name].shape)
    odd[...] = arrays[name]
    arrays[name] = odd
    inputs = [arrays[n] for n in "qkv"]
    with pytest.raises(NotImplementedError, match=f"sm90: {name}: its rows do not begin at multiples of 16 bytes"):
        cuflash.attention(*inputs, out=arrays["out"], kernel="sm90")
    out, lse = cuflash.attention(*inputs, out=arrays["out"], return_lse=True)
    assert_attention_accurate(*problem.arrays(), out, lse)


@pytest.mark.gpu
def test_a_sink_far_above_the_scores_beside_nan(hopper: Any) -> None:
    """Rows that are computed again have the weights that the sink has left them."""
    q, k, v = inputs_of(hopper, 300, 64)
    v[:, :, 250] = math.nan
    sinks = hopper.full(4, 20.0, "float32")
    out, lse = cuflash.attention(q, k, v, causal=True, sinks=sinks, return_lse=True, kernel="sm90")
    arrays = (hopper.asnumpy(x) for x in (q, k, v, out, lse))
    assert_attention_accurate(*arrays, causal=True, sinks=hopper.asnumpy(sinks))


@pytest.mark.gpu
def test_expressions_of_sequences_without_keys(hopper: Any) -> None:
    q, k, v = (normal(hopper, (300, 4, 64), seed) for seed in range(3))
    offsets_q = hopper.asarray([0, 100, 200, 290], "int32")
    offsets_k = hopper.asarray([0, 120, 120, 300], "int32")
    options = {"score_mod": "score + table(kv_idx)", "mod_args": {"table": hopper.zeros(200, "float32")}}
    out, lse = cuflash.attention_varlen(q, k, v, offsets_q, offsets_k, return_lse=True, kernel="sm90", **options)
    plain, _ = cuflash.attention_varlen(q, k, v, offsets_q, offsets_k, return_lse=True, kernel="sm90")
    assert not out[100:200].any()
    assert not out[290:].any()
    assert bool((lse[:, 100:200] == -math.inf).all())
    assert float(abs(out.astype("float32") - plain.astype("float32")).max()) < 0.02


@pytest.mark.gpu
def test_a_block_mask_far_behind_the_last_key(hopper: Any) -> None:
    """Queries whose window begins behind all keys see nothing, and look nowhere."""
    q = normal(hopper, (1, 1, 8192, 64), 0)
    k, v = (normal(hopper, (1, 1, 128, 64), seed) for seed in (1, 2))
    block_mask = cuflash.make_block_mask(mask_mod="kv_idx <= q_idx", shape=(1, 1, 8192, 128))
    options = {"causal": "top-left", "window_size": (16, None), "mask_mod": "kv_idx <= q_idx"}
    out = cuflash.attention(q, k, v, block_mask=block_mask, kernel="sm90", **options)
    expected = cuflash.attention(q, k, v, block_mask=block_mask, kernel="wmma", **options)
    assert not out[:, :, 144:].any()
    assert float(abs(out.astype("float32") - expected.astype("float32")).max()) < 0.02
