"""``python -m cuflash tune``: measure the tiles that kernels might have, and show what it would change."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

from cuflash import _sm80, _sm80_tiles, _sm90, _sm90_backward, _sm90_block, _wmma
from cuflash._call import Call
from cuflash._cli import console
from cuflash._cli.bench.cells import TOKENS, WIDTH, Cell, Op, flops
from cuflash._cli.bench.contenders import prepare
from cuflash._cli.bench.machine import dtype_named
from cuflash._cli.bench.timing import Contender, Spread, describe, measure_in_turn
from cuflash._cli.families import known_chips, obstacles
from cuflash._device import Chip
from cuflash._kernel import NUMBERS, Kernel, padded_head_dims
from cuflash._launch import FAMILIES
from cuflash._options import PLAIN
from cuflash._problem import MAX_HEAD_DIM, Operand, Problem, Window

SEQLEN = 4096
MASKS = {"full": False, "causal": True}
WORTH_IT = 1.01  # times as fast; less is noise

Tile = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A family of kernels, forward or backward, whose tiles stand in a table.

    Parameters
    ----------
    name : str
        Its name.
    op : {"forward", "backward"}
        What the kernels compute.
    table : dict
        The tiles; who asks for a kernel gets the first that suits.
    key : callable
        ``key(problem, number, chip)``: the entry of the table that is looked up first.
    made : callable
        ``made(problem, options, number, chip)``: the kernel, and more.
    candidates : callable
        ``candidates(problem, chip)``: tiles that might be fast; not all fit.
    make : callable
        A tile of the table, from its numbers.
    """

    name: str
    op: Op
    table: dict[Any, Any]
    key: Callable[[Problem, str, Chip], tuple[int, ...]]
    made: Callable[..., tuple[Any, ...]]
    candidates: Callable[[Problem, Chip], Iterator[Tile]]
    make: Callable[[Iterable[int]], Tile]

    @property
    def label(self) -> str:
        return self.name if self.op == "forward" else f"{self.name} {self.op}"

    def kernel(self, problem: Problem, chip: Chip) -> Kernel | None:
        """The kernel that a plain call takes, or None if there is none."""
        family = FAMILIES[self.name]
        reason = family.why_not(problem, problem.dtype, chip)
        if self.op == "backward":
            reason = reason or family.why_no_backward(problem, chip)
        if reason is not None:
            return None
        try:
            kernel: Kernel = self.made(problem, PLAIN, problem.dtype, chip)[0]
        except NotImplementedError:
            return None
        return kernel

    @contextmanager
    def only(self, tile: Tile, problem: Problem, chip: Chip) -> Iterator[None]:
        """Calls like the problem take this tile, if it suits them."""
        key = self.key(problem, problem.dtype, chip)
        before = self.table.get(key)
        self.table[key] = [self.make(tile)]
        try:
            yield
        finally:
            if before is None:
                del self.table[key]
            else:
                self.table[key] = before

    def fitting(self, problem: Problem, chip: Chip) -> dict[Tile, Kernel]:
        """The candidates that suit a problem and fit a chip, with what the table says first."""
        now = self.kernel(problem, chip)
        found = {} if now is None else {tile_of(now): now}
        for tile in self.candidates(problem, chip):
            with self.only(tile, problem, chip):
                kernel = self.kernel(problem, chip)
            if kernel is not None and tile_of(kernel) == tile:
                found.setdefault(tile, kernel)
        return found


def tile_of(kernel: Kernel) -> Tile:
    """The template arguments behind the number, the options and the two head dimensions."""
    return tuple(int(argument) for argument in kernel.arguments[4:] if argument not in ("true", "false"))


def _sm90_candidates(problem: Problem, chip: Chip) -> Iterator[Tile]:
    """As many keys as registers allow, and as many stages of keys and values as shared memory holds."""
    dims = _sm90._dims(problem)
    for block_m, block_n, stages_q in product((128, 192), range(64, 177, 16), (1, 2)):
        registers = 232 if block_m == 128 else 160
        if (block_n + dims[1]) / 2 + block_n / 4 > 0.8 * registers:  # scores and output, and weights of half the size
            continue
        tiles = (_sm90_block.Tile(block_m, block_n, stages_q, stages, stages) for stages in (4, 3, 2))
        fitting = (tile for tile in tiles if _sm90_block.shared_bytes(dims, tile, PLAIN) <= chip.shared_memory)
        yield from islice(fitting, 1)


def _sm90_backward_candidates(problem: Problem, chip: Chip) -> Iterator[Tile]:
    """64 keys a consumer, or beyond 128 columns 64 for both; places are powers of two, those for Q at least two."""
    dims = _sm90_backward._dims(problem)
    block_n = 128 if dims[0] <= 128 else 64
    # Plain calls have no pairs: tiles that differ in places for them alone are one, the first of the table.
    places = {tile[:4]: tile.stages_pairs for tile in reversed(_sm90_backward.TILES[dims])}
    for block_m, stages_kv, stages in product((64, 128) if dims[0] <= 64 else (64,), (1, 2), (2, 4)):
        numbers = block_m, block_n, stages_kv, stages
        yield *numbers, places.get(numbers, 1)


def _sm80_candidates(problem: Problem, chip: Chip) -> Iterator[Tile]:
    """As many keys as the registers of a warp's 16, 32 or 48 rows allow, beside the output, and the part of Q there."""
    dim, dim_v = padded_head_dims(problem)
    shapes = [*((64, 4, keys) for keys in (32, 64, 128)), *((128, 4, keys) for keys in (32, 48, 64, 96, 128))]
    shapes += [(192, 4, 64), (128, 8, 64), (128, 8, 128)]
    for (block_m, warps, block_n), stages, kept_q in product(shapes, (1, 2), (0, dim - 48, dim)):
        if block_m // warps // 16 * (block_n + dim_v + kept_q // 2) // 2 <= 220:
            yield block_m, block_n, warps, stages, kept_q


def _sm80_backward_candidates(problem: Problem, chip: Chip) -> Iterator[Tile]:
    """As many keys as registers allow: a warp holds their dK and dV, or a part of the columns, beside scores."""
    dim, dim_v = padded_head_dims(problem)
    shapes = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 4), (1, 2, 4), (1, 2))
    for block_m, block_n, warps, splits, parts, stages in shapes:
        # Of a warp.
        keys, queries, cols = block_n * splits // warps, block_m // (splits * parts), (dim + dim_v) // splits
        works = (
            keys in (16, 32) and queries in (16, 32, 64) and block_m <= 32 * warps and min(dim, dim_v) // splits >= 32
        )
        worth_it = (queries > 16 or parts == 1) and (cols >= 128 or splits == 1)
        if works and worth_it and keys * (cols + 2 * queries) <= 220 * 32:
            yield block_m, block_n, warps, splits, parts, stages, 1


def _sm80_key(problem: Problem, number: str, chip: Chip) -> tuple[int, ...]:
    return _sm80.tile_class(_sm80_tiles.FORWARD_TILES, problem, chip)


def _wmma_candidates(problem: Problem, chip: Chip) -> Iterator[Tile]:
    yield from ((block_m, block_n, 4) for block_m, block_n in product((64, 128), (16, 32, 48, 64, 96, 128)))
    yield from ((128, block_n, 8) for block_n in (32, 64, 128))


def _wmma_key(problem: Problem, number: str, chip: Chip) -> tuple[int, ...]:
    return NUMBERS[number][2], padded_head_dims(problem)[0], chip.capability[0]


def _sm80_backward_key(problem: Problem, number: str, chip: Chip) -> tuple[int, ...]:
    return _sm80.tile_class(_sm80_tiles.DKDV_TILES, problem, chip)


def _sm90_key(problem: Problem, number: str, chip: Chip) -> tuple[int, ...]:
    return _sm90._dims(problem)


def _sm90_backward_key(problem: Problem, number: str, chip: Chip) -> tuple[int, ...]:
    return _sm90_backward._dims(problem)


TUNED = (
    Family("sm90", "forward", _sm90.TILES, _sm90_key, _sm90.forward, _sm90_candidates, _sm90_block.Tile._make),
    Family(
        "sm80", "forward", _sm80_tiles.FORWARD_TILES, _sm80_key, _sm80.forward,
        _sm80_candidates, _sm80_tiles.Tile._make,
    ),
    Family("wmma", "forward", _wmma.FORWARD_TILES, _wmma_key, _wmma.forward, _wmma_candidates, tuple),
    Family(
        "sm90", "backward", _sm90_backward.TILES, _sm90_backward_key, _sm90_backward.kernels,
        _sm90_backward_candidates, _sm90_backward.Tile._make,
    ),
    Family(
        "sm80", "backward", _sm80_tiles.DKDV_TILES, _sm80_backward_key, _sm80.backward,
        _sm80_backward_candidates, _sm80_tiles.DkDvTile._make,
    ),
)  # fmt: skip


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="measure the tiles that kernels might have",
        description="Measure the tiles that kernels might have on plain calls, and show what would change.",
    )
    parser.add_argument("--head-dim", nargs="+", type=_head_dim, default=[64, 128, 256], help="default: 64 128 256")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--arch",
        choices=[chip.arch for chip in known_chips()],
        help="measure nothing; list the tiles that fit such a GPU",
    )
    parser.set_defaults(run=run)


def _head_dim(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_HEAD_DIM:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed are 1 to {MAX_HEAD_DIM}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    if options.arch is not None:
        (chip,) = (chip for chip in known_chips() if chip.arch == options.arch)
        _check_dtype(options.dtype, chip)
        for head_dim in options.head_dim:
            console.show(listed(chip, options.dtype, head_dim))
        return 0
    try:
        from cuflash._cli.bench.gpu import Gpu

        machine = Gpu()
    except Exception as error:
        print(f"No GPU to measure ({describe(error)}). --arch lists the tiles that fit a GPU, such as --arch sm_90.")
        return 1
    _check_dtype(options.dtype, machine.device.chip)
    dtype_named(options.dtype)  # if it cannot be had, now and not below
    changes = []
    for head_dim in options.head_dim:
        table, found = measured(machine, options.dtype, head_dim)
        console.show(table)
        changes += found
    print("\n".join(changes or ["The tables are as fast as anything that was measured."]))
    return 0


def _check_dtype(dtype: str, chip: Chip) -> None:
    """Refuse a dtype that no family with tiles computes on a chip: all tables would be empty."""
    reasons = obstacles(dtype, chip)
    if all(reasons[family.name] for family in TUNED):
        raise SystemExit(f"python -m cuflash tune: error: {reasons['wmma']}. Try another one: --dtype float16")


def problem_of(cell: Cell) -> Problem:
    sizes = (cell.batch, cell.heads, cell.heads, cell.seqlen, cell.seqlen, cell.head_dim, cell.head_dim)
    window = Window.of(cell.causal, None)
    return Problem(cell.dtype, *sizes, cell.head_dim**-0.5, window=window)


def cell_of(head_dim: int, causal: bool, dtype: str) -> Cell:
    return Cell(head_dim, causal, SEQLEN, TOKENS // SEQLEN, WIDTH // head_dim, dtype)


def listed(chip: Chip, dtype: str, head_dim: int) -> console.Table:
    """The tiles that fit a chip."""
    rows = []
    for family in TUNED:
        problems = {name: problem_of(cell_of(head_dim, causal, dtype)) for name, causal in MASKS.items()}
        in_use = {name: family.kernel(problem, chip) for name, problem in problems.items()}
        for tile, kernel in family.fitting(problems["full"], chip).items():
            users = ", ".join(name for name, used in in_use.items() if used is not None and tile_of(used) == tile)
            rows.append([family.label, _text(tile), f"{kernel.shared_bytes / 1024:.0f}", users])
    return console.Table(f"D {head_dim}, {chip.arch}", ["family", "tile", "shared KiB", "in use"], rows)


def measured(machine: Any, dtype: str, head_dim: int) -> tuple[console.Table, list[str]]:
    """The speed of the tiles on a machine, and where another one is faster than the one in use."""
    speeds: dict[tuple[str, Tile], dict[str, str]] = {}
    changes = []
    for (mask, causal), family in product(MASKS.items(), TUNED):
        cell = cell_of(head_dim, causal, dtype)
        problem = problem_of(cell)
        tiles = list(family.fitting(problem, machine.device.chip))
        inputs = [machine.normal(cell.shape, dtype, seed) for seed in range(4)]
        ready, _ = prepare({_text(tile): partial(_call, machine, family, tile, problem, inputs) for tile in tiles})
        found = measure_in_turn(ready, machine.sample, rounds=3, round_ms=20)
        rates = {
            tile: flops(family.op, cell) / spread.median / 1e9
            for tile in tiles
            if isinstance(spread := found.get(_text(tile)), Spread)  # not all tiles compile
        }
        for tile, rate in rates.items():
            mark = " *" if tile == tiles[0] else ""
            speeds.setdefault((family.label, tile), {})[mask] = f"{rate:.0f}{mark}"
        if tiles and tiles[0] in rates:
            best = max(rates, key=lambda tile: rates[tile])
            gain = rates[best] / rates[tiles[0]]
            if gain > WORTH_IT:
                changes.append(
                    f"{family.label}, D {head_dim}, {mask}: {_text(best)} instead of {_text(tiles[0])}, "
                    f"{100 * (gain - 1):.0f} % faster"
                )
        machine.release()
    rows = [[name, _text(tile), *(found.get(mask, "") for mask in MASKS)] for (name, tile), found in speeds.items()]
    title = f"D {head_dim}, S {SEQLEN}, {dtype}, TFLOP/s by tile (* in use)"
    return console.Table(title, ["family", "tile", *MASKS], rows), changes


def _call(machine: Any, family: Family, tile: Tile, problem: Problem, inputs: list[Any]) -> Contender:
    """A call with this tile, on q, k, v and dout."""
    q, k, v, dout = inputs
    device, strides = machine.device, tuple(stride // q.dtype.itemsize for stride in q.strides)
    names = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    call = Call(
        device,
        problem.dtype,
        problem,
        dict.fromkeys(names, Operand.of(q.shape, strides, dtype=problem.dtype)),
        PLAIN,
    )
    out, lse = device.empty(q.shape, q.dtype), device.empty(q.shape[:3], "float32")
    with family.only(tile, problem, device.chip):
        if family.op == "forward":
            return Contender(partial(call.plan(FAMILIES[family.name].plan_forward), q, k, v, out, None))
        backward = call.plan(FAMILIES[family.name].plan_backward)
    lse[...] = 0  # any numbers do: no time depends on them
    gradients = [device.empty(q.shape, q.dtype) for _ in range(3)]
    return Contender(partial(backward, dout, q, k, v, dout, lse, *gradients))


def _text(tile: Tile) -> str:
    return " ".join(map(str, tile))
