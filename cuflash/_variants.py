"""What a call has beyond q, k and v: arrays of one kind, and what a plan depends on of them."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import numpy as np

from . import _check_mods, _check_options
from ._backends import Backend, backend_of
from ._block_mask import BlockMask
from ._problem import Mod

MetaTuple = tuple[tuple[int, ...], tuple[int, ...], Any, bool]


class Meta(NamedTuple):
    """What a plan depends on of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    aligned: bool = True  # it begins at a multiple of 16 bytes; kernels alone ask, so NumPy's need not be

    @property
    def ndim(self) -> int:
        return len(self.shape)


def meta_of(array: Any) -> MetaTuple:
    """The fields of Meta as a plain tuple, which is made and hashed faster."""
    return array.shape, array.strides, array.dtype, isinstance(array, np.ndarray) or array.data.ptr % 16 == 0


class BlockMaskMeta(NamedTuple):
    """What a plan depends on of a block mask."""

    shape: tuple[int, int]
    visible: Meta


class Variant(NamedTuple):
    """What a call has beyond q, k and v.

    Parameters
    ----------
    extras : dict
        The arguments that a backend's run takes by keyword.
    arrays : dict
        The arrays among them, by the names that errors call them.
    metas : tuple
        What a plan depends on of the extras: pairs of a name and a hashable.
    mod : Mod or None
        The programmable score and mask.
    """

    extras: dict[str, Any]
    arrays: dict[str, Any]
    metas: tuple[tuple[str, Any], ...]
    mod: Mod | None


PLAIN = Variant({}, {}, (), None)


def gather(
    inputs: dict[str, Any],
    *,
    offsets: dict[str, Any] | None = None,
    out: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    mod_args: Any = None,
    **options: Any,
) -> tuple[Backend, Variant]:
    """The backend of a call with these inputs and options, of which those count that are not None, and its variant.

    `offsets` are those of packed sequences, and `out` is the array that a caller gave for the result.
    """
    extras = (offsets or {}) | {name: value for name, value in options.items() if value is not None}
    arguments = _check_mods.arguments(mod_args)
    if arguments:
        extras["mod_args"] = arguments
    if "seed" in extras and _check_options.is_seed_number(extras["seed"]):
        extras["seed"] = int(extras["seed"])
    if "block_mask" in extras:
        check_block_mask(extras["block_mask"], extras.keys() | ({"mask_mod"} if mask_mod is not None else set()))
    arrays = {name: array for option, value in extras.items() for name, array in _arrays_of(option, value)}
    given = inputs | ({} if out is None else {"out": out}) | arrays
    backend = backend_of(*given.values(), names=tuple(given))
    if "seed" in arrays:
        _check_options.seed_array(arrays["seed"])
    mod = _check_mods.mod(backend.mod_kind, score_mod, mask_mod, arguments)
    return backend, Variant(extras, arrays, tuple((name, _option_meta(value)) for name, value in extras.items()), mod)


def check_block_mask(value: Any, given: Set[str]) -> None:
    """Raise an exception if it is none, or if options that it needs are not among those given."""
    if not isinstance(value, BlockMask):
        kind = type(value)
        raise TypeError(
            f"block_mask: got a {kind.__module__}.{kind.__qualname__}; allowed are None and a cuflash.BlockMask, "
            "as cuflash.make_block_mask returns"
        )
    missing = next((name for name in value.needs if name not in given), None)
    if missing is not None:
        raise ValueError(
            f"{missing}: got None beside a block_mask that was made of a {missing}; it is needed for blocks that are "
            "seen in part. For a mask of whole blocks there is BlockMask.from_blocks"
        )


def _arrays_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays in the value of an option, with the names that errors call them."""
    if name == "mod_args":
        yield from ((f"{name}[{key!r}]", item) for key, item in value.items() if not _check_mods.is_number(item))
    elif name == "block_mask":
        yield from ((f"{name}.visible", value.visible), (f"{name}.full", value.full))
    elif name != "seed" or not isinstance(value, int):
        yield name, value


def _option_meta(value: Any) -> Any:
    """What a plan depends on of an option: nothing of a seed's value and of mod_args, which Mod describes."""
    if isinstance(value, (int, dict)):
        return None
    if isinstance(value, BlockMask):
        return BlockMaskMeta(value.shape, Meta(*meta_of(value.visible)))
    return Meta(*meta_of(value))
