"""The sm80 family: FlashAttention-2 by mma.sync, for Ampere and everything since (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import _parts
from ._call import Call, Run
from ._device import Array, Chip
from ._gradients import Inputs, Workspace, operand_of_delta, plan_gradients
from ._kernel import (
    BACKWARD_INPUTS,
    MIN_SCALE,
    NUMBERS,
    Kernel,
    mma_number,
    num_key_jobs,
    num_places,
    num_query_jobs,
    padded_head_dims,
)
from ._options import PLAIN, Options
from ._problem import Operand, Problem, ceil_div
from ._sm80_tiles import (
    BACKWARD_FRUGAL_TILES,
    DKDV_TILES,
    DQ_FRUGAL_TILES,
    DQ_PARKED,
    DQ_TILES,
    FLOAT32_DKDV_TILES,
    FLOAT32_DQ_TILES,
    FLOAT32_FORWARD_TILES,
    FLOAT32_FRUGAL_TILES,
    FORWARD_TILES,
    FRUGAL_TILES,
    PARKED,
    SHORT_TILES,
    DkDvTile,
    DqTile,
    FrugalTiles,
    Tile,
    Tiles,
)

CAPABILITY = (8, 0)
WORK_BYTES, DKDV_WORK_BYTES, DQ_WORK_BYTES = 240, 80, 224  # what a block knows of its job


def why_not(
    problem: Problem, number: str, chip: Chip, options: Options = PLAIN, operands: Mapping[str, Operand] | None = None
) -> str | None:
    """The reason why the family cannot compute the problem on a GPU, or None if it can."""
    if chip.capability < CAPABILITY:
        return (
            f"it needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, "
            f"{chip.name} has {chip.capability[0]}.{chip.capability[1]}"
        )
    if problem.softmax_scale < MIN_SCALE:
        return f"it takes scales from {MIN_SCALE:.3g}, not {problem.softmax_scale}"
    kernels = (forward, backward, backward_dkdv, backward_dq) if _size(problem) == 2 else (forward,)
    if any(kernel.tile(problem, options, chip) is None for kernel in kernels):
        return _too_little_memory(problem, options, chip)
    return None


def leaves_to_wmma(problem: Problem, chip: Chip) -> bool:
    """Whether kernel="auto" asks wmma first: one family computes both passes of float32, and so it must have both."""
    return problem.dtype == "float32" and why_no_backward(problem, chip) is not None


def _too_little_memory(problem: Problem, options: Options, chip: Chip) -> str:
    with_what = ", ".join((f"head_dim {problem.head_dim}", *options.arguments))
    return f"{chip.name} has too little shared memory for a tile with {with_what}"


def _size(problem: Problem) -> int:
    """Bytes of an element."""
    return 4 if problem.dtype == "float32" else 2


def _forward_bytes(size: int, dims: tuple[int, int], tile: Tile, options: Options) -> int:
    """Tiles of Q, K and V, of arrays of pairs, hidden pairs, and careful rows (attention/careful_row.cuh)."""
    pairs, careful = options.tile_bytes(*tile[:2]), options.tile_bytes(1, 32)
    stage = size * tile.block_n * sum(dims) + max(pairs, 16)
    hidden = 8 * tile.block_m * ceil_div(tile.block_n, 64) if "block_mask" in options.names else 16
    work = WORK_BYTES + ceil_div(max(options.dtype.itemsize, 1), 16) * 16
    return size * tile.block_m * dims[0] + tile.stages * stage + hidden + tile.warps * max(careful, 16) + work


def _dkdv_bytes(size: int, dims: tuple[int, int], tile: DkDvTile, options: Options) -> int:
    stage = size * tile.block_m * sum(dims) + 8 * tile.block_m + max(options.tile_bytes(*tile[:2]), 16)
    pairs, nothing = size * tile.block_n * tile.block_m, size * 16 * 32
    weights, dscores = (pairs if shared else nothing for shared in (tile.splits > 1, tile.splits > 1 or tile.adds_dq))
    tiles = size * tile.block_n * sum(dims) + weights + dscores + tile.stages * stage
    return tiles + _careful_bytes(tile.warps, options) + DKDV_WORK_BYTES


def _dq_bytes(size: int, dims: tuple[int, int], tile: DqTile, options: Options) -> int:
    stage = size * tile.block_n * sum(dims) + max(options.tile_bytes(*tile[:2]), 16)
    dscores = size * tile.block_m * tile.block_n if tile.splits > 1 else 16
    tiles = size * tile.block_m * sum(dims) + dscores + tile.stages * stage
    return tiles + _careful_bytes(tile.warps, options) + DQ_WORK_BYTES


def _careful_bytes(warps: int, options: Options) -> int:
    """Of attention/careful_gradients.cuh."""
    return warps * max(options.tile_bytes(16, 16), 16)


def tile_class(tiles: Tiles | FrugalTiles, problem: Problem, chip: Chip) -> tuple[int, int, int]:
    """The entry of a table for a problem on a chip; there may be none with its head dimensions."""
    dims = padded_head_dims(problem)
    classes = [kib for *of_dims, kib in tiles if tuple(of_dims) == dims]
    return (*dims, max((kib for kib in classes if kib * 1024 <= chip.shared_memory), default=min(classes, default=0)))


@dataclass(frozen=True)
class _TiledKernel:
    """A kernel template; called for a problem, it gives the kernel to launch and the number of its blocks."""

    template: str
    header: str
    tiles: Mapping[int, Tiles]  # by the size of elements
    shared_bytes: Callable[[int, tuple[int, int], Any, Options], int]
    num_blocks: Callable[[Problem, Any], int]
    pointers: tuple[str, ...]
    params: str
    frugal_tiles: Mapping[int, FrugalTiles] = field(default_factory=dict)
    parked: Mapping[tuple[int, int], set[str]] = field(default_factory=dict)
    short_tiles: Mapping[int, dict[tuple[int, int], Any]] = field(default_factory=dict)
    change: Callable[[Any], Any] = lambda tile: tile
    name: str = ""  # if not that of the header
    more_arguments: tuple[str, ...] = ()

    def tile(self, problem: Problem, options: Options, chip: Chip) -> Any:
        """The tile that suits a call, or None if none fits the shared memory."""
        size, dims = _size(problem), padded_head_dims(problem)
        tiles = self.tiles[size][tile_class(self.tiles[size], problem, chip)]
        frugal_tiles = self.frugal_tiles.get(size, {})
        frugal = frugal_tiles.get(tile_class(frugal_tiles, problem, chip), {})
        short = self.short_tiles.get(size, {}).get(dims)
        parked = self.parked.get(dims, set()) if chip.capability == (9, 0) else set()
        names = options.names_in_every_tile - parked
        tiles = (*(tile for tile, hungry in frugal.items() if hungry & names), *tiles)
        if short and problem.seqlen_q <= short.block_m:
            tiles = (short, *tiles)
        return next(
            (
                tile
                for tile in map(self.change, tiles)
                if options.allows_tile(*tile[:2]) and self.shared_bytes(size, dims, tile, options) <= chip.shared_memory
            ),
            None,
        )

    def __call__(self, problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, int]:
        dims, tile = padded_head_dims(problem), self.tile(problem, options, chip)
        assert tile is not None, "why_not has found one"
        name, short, _ = mma_number(number, dims)
        kernel = Kernel(
            template=self.template,
            header=self.header,
            symbol="_".join(("cuflash", self.name or self.header, short, f"d{dims[0]}x{dims[1]}", *options.names)),
            arguments=(f"cuflash::{name}", options.type, *dims, *map(int, tile), *self.more_arguments),
            pointers=self.pointers,
            params=self.params,
            num_threads=32 * tile.warps,
            shared_bytes=self.shared_bytes(_size(problem), dims, tile, options),
            options=options,
        )
        return kernel, self.num_blocks(problem, tile)


def _query_blocks(problem: Problem, tile: Tile | DqTile) -> int:
    return num_query_jobs(problem, tile.block_m)


def _key_blocks(problem: Problem, tile: DkDvTile) -> int:
    return num_key_jobs(problem, tile.block_n)


forward = _TiledKernel(
    template="FwdSm80",
    header="fwd_sm80",
    tiles={2: FORWARD_TILES, 4: FLOAT32_FORWARD_TILES},
    shared_bytes=_forward_bytes,
    num_blocks=_query_blocks,
    pointers=("const Element* q", "const Element* k", "const Element* v", "Element* out", "float* lse"),
    params="FwdParams",
    frugal_tiles={2: FRUGAL_TILES, 4: FLOAT32_FRUGAL_TILES},
    parked=PARKED,
    short_tiles={2: SHORT_TILES},
)
forward_parts = replace(
    forward,
    name="fwd_sm80_parts",
    pointers=("const Element* q", "const Element* k", "const Element* v", "float* parts", "float* part_sums"),
    more_arguments=("float", "true"),
)
backward_dkdv = _TiledKernel(
    template="BwdSm80DkDv",
    header="bwd_sm80_dkdv",
    tiles={2: DKDV_TILES, 4: FLOAT32_DKDV_TILES},
    shared_bytes=_dkdv_bytes,
    num_blocks=_key_blocks,
    pointers=(*BACKWARD_INPUTS, "Element* dk", "Element* dv", "float* dq_sums"),
    params="BwdParams",
)
backward = replace(
    backward_dkdv,
    name="bwd_sm80",
    frugal_tiles={2: BACKWARD_FRUGAL_TILES},
    change=lambda tile: tile._replace(adds_dq=True),
)
backward_dq = _TiledKernel(
    template="BwdSm80Dq",
    header="bwd_sm80_dq",
    tiles={2: DQ_TILES, 4: FLOAT32_DQ_TILES},
    frugal_tiles={2: DQ_FRUGAL_TILES},
    parked=DQ_PARKED,
    shared_bytes=_dq_bytes,
    num_blocks=_query_blocks,
    pointers=(*BACKWARD_INPUTS, "Element* dq"),
    params="BwdParams",
)


def plan_forward(call: Call) -> Run:
    """A function of (q, k, v, out, lse or None) and the arrays of the options that computes out and lse."""
    of_call = call.problem, call.options, call.number, call.chip
    kernel, num_blocks = forward(*of_call)
    tile = forward.tile(call.problem, call.options, call.chip)
    num_parts = _parts.num_parts(
        call.problem, num_blocks, num_places(kernel, call.chip), tile.block_m, _parts.MIN_TILES * tile.block_n
    )
    if num_parts > 1:
        return _parts.plan_forward(call, forward_parts(*of_call), num_parts)
    step, null = call.step((kernel, num_blocks)), call.device.null

    def run(q: Array, k: Array, v: Array, out: Array, lse: Array | None, **extras: Any) -> None:
        step(q, k, v, out, null if lse is None else lse, options=call.options_argument(extras))

    return run


def why_no_backward(problem: Problem, chip: Chip, options: Options = PLAIN) -> str | None:
    """The reason why it cannot compute gradients, or None if it can."""
    if problem.dtype != "float32":
        return None
    if any(kernel.tile(problem, options, chip) is None for kernel in (backward_dkdv, backward_dq)):
        return _too_little_memory(problem, options, chip)
    return None


def _rows_of_sums(problem: Problem, tile: DkDvTile) -> int:
    """Queries of a tile of sums of dq: a thread holds at most 64 sums at once."""
    head_dim, _ = padded_head_dims(problem)
    return tile.block_m if tile.block_m * head_dim <= 64 * 32 * tile.warps else tile.block_m // 2


def _blocks_of_sums(problem: Problem, tile: DkDvTile) -> int:
    return num_query_jobs(problem, _rows_of_sums(problem, tile))


def finish(problem: Problem, options: Options, number: str, chip: Chip) -> tuple[Kernel, int]:
    """The kernel that rounds the sums of dq, and the number of its blocks."""
    name, short, _ = NUMBERS[number]
    dims, tile = padded_head_dims(problem), backward.tile(problem, options, chip)
    kernel = Kernel(
        template="BwdSm80Finish",
        header="bwd_sm80_finish",
        symbol="_".join(("cuflash_bwd_sm80_finish", short, f"d{dims[0]}x{dims[1]}", *options.names)),
        arguments=(f"cuflash::{name}", options.type, *dims, _rows_of_sums(problem, tile), tile.warps),
        pointers=(*BACKWARD_INPUTS, "Element* dq", "const float* dq_sums"),
        params="BwdParams",
        num_threads=32 * tile.warps,
        shared_bytes=_careful_bytes(tile.warps, options),
        options=options,
    )
    return kernel, _blocks_of_sums(problem, tile)


def plan_backward(call: Call) -> Run:
    """A function of (dout, q, k, v, out, lse, dq, dk, dv) and the arrays of the options that computes gradients."""
    device, problem, delta = call.device, call.problem, operand_of_delta(call.problem)
    of_call = problem, call.options, call.number, call.chip
    if call.deterministic or problem.dtype == "float32":
        dkdv_step, dq_step = (call.step(make(*of_call), delta=delta) for make in (backward_dkdv, backward_dq))

        def apart(inputs: Inputs, _: Workspace, dq: Array, dk: Array, dv: Array, options: tuple[Any, ...]) -> None:
            dkdv_step(*inputs, dk, dv, device.null, options=options)
            dq_step(*inputs, dq, options=options)

        return plan_gradients(call, apart, by_mma=True)

    step, finish_step = (call.step(make(*of_call), delta=delta) for make in (backward, finish))
    tile = backward.tile(problem, call.options, call.chip)
    num_sums = _blocks_of_sums(problem, tile) * _rows_of_sums(problem, tile) * padded_head_dims(problem)[0]

    def in_one_pass(
        inputs: Inputs, workspace: Workspace, dq: Array, dk: Array, dv: Array, options: tuple[Any, ...]
    ) -> None:
        step(*inputs, dk, dv, workspace.sums, options=options)
        finish_step(*inputs, dq, workspace.sums, options=options)

    return plan_gradients(call, in_one_pass, num_sums)
