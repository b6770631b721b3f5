"""Block masks: which blocks of 128 queries and 128 keys hold pairs that see each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from . import _backends, _check_mods, _check_options, _checks
from ._backends import Backend, backend_of
from ._problem import BLOCK_SIZE, WORD_BITS, ceil_div

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``. NumPy's functions hand CuPy's arrays over to CuPy's."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of 128 x 128 pairs are worth a visit, for the option `block_mask` of :func:`attention`.

    :func:`make_block_mask` makes one out of a mask or a `mask_mod`, :meth:`from_blocks` out of its blocks. Its arrays
    must not change, because kernels read a packed copy of them; those of NumPy are read-only.

    Attributes
    ----------
    visible : array of bool, shape (B or 1, Hq or 1, ceil(M / 128), ceil(N / 128))
        False where no pair of a block of queries and keys is seen; the block is skipped.
    full : array of bool, of the same shape
        True where all its pairs are seen; `mask` and `mask_mod` are not looked at. Causal masks and windows are.
    shape : (int, int)
        The numbers of queries and keys, M and N.
    needs : tuple of str
        The options that calls must have too, because they decide about the pairs of blocks that are seen in part:
        what :func:`make_block_mask` made it of.

    Raises
    ------
    TypeError, ValueError
        As :meth:`from_blocks` does.

    References
    ----------
    As of :func:`make_block_mask`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> block_mask = cuflash.make_block_mask(np.tri(200, dtype=bool))
    >>> block_mask.visible[0, 0].tolist(), block_mask.full[0, 0].tolist(), block_mask.needs
    ([[True, False], [True, True]], [[False, False], [True, False]], ('mask',))
    """

    visible: Array
    full: Array
    shape: tuple[int, int]
    needs: tuple[str, ...] = ()
    words: tuple[Array, Array] = field(init=False, repr=False)  # bits of blocks of keys, in rows of uint32

    @classmethod
    def from_blocks(cls, visible: Array, full: Array | None = None, *, shape: tuple[int, int]) -> BlockMask:
        """Describe a mask by blocks that are known already.

        Parameters
        ----------
        visible : array of bool, shape (..., ceil(M / 128), ceil(N / 128))
            False for the blocks to skip; the axes before, none to two of them, are batch and heads.
        full : array of bool, shape of ``visible``, optional
            True for the blocks whose pairs are all seen. Default: none.
        shape : (int, int)
            M and N.

        Returns
        -------
        BlockMask
            It holds copies.

        Raises
        ------
        TypeError, ValueError
            If an array is not of this kind, dtype or shape.

        Examples
        --------
        >>> import numpy as np
        >>> import cuflash
        >>> q = np.zeros((4, 256, 64), np.float32)
        >>> block_mask = cuflash.BlockMask.from_blocks(np.eye(2, dtype=bool), shape=(256, 256))
        >>> cuflash.attention(q, q, q, block_mask=block_mask).shape
        (4, 256, 64)
        """
        if full is None:
            backend_of(visible, names=("visible",))
            full = np.zeros_like(visible)
        return cls(visible, full, shape)

    def __post_init__(self) -> None:
        arrays = {"visible": self.visible, "full": self.full}
        backend_of(*arrays.values(), names=tuple(arrays))
        seqlen_q, seqlen_k = _checks.shape(self.shape, 2)
        blocks = (ceil_div(seqlen_q, BLOCK_SIZE), ceil_div(seqlen_k, BLOCK_SIZE))
        for name, array in arrays.items():
            if array.dtype != bool:
                raise TypeError(f"{name}: dtype {array.dtype} is not supported here; allowed: bool")
            if not 2 <= array.ndim <= 4 or array.shape[-2:] != blocks or array.shape != self.visible.shape:
                raise ValueError(
                    f"{name}: shape is {array.shape}; it must end in {blocks}, the blocks of {BLOCK_SIZE} x "
                    f"{BLOCK_SIZE} in {(seqlen_q, seqlen_k)}, after at most two axes for batch and heads, and agree "
                    "between visible and full"
                )
        visible = self.visible.reshape((1,) * (4 - self.visible.ndim) + self.visible.shape).copy()
        full = self.full.reshape(visible.shape) & visible
        # Packed at once: a call that is captured in a CUDA graph would only note down the packing.
        words = _packed(visible), _packed(full)
        for array in (visible, full, *words):
            if isinstance(array, np.ndarray):  # CuPy knows no read-only arrays
                array.flags.writeable = False  # or blocks and words would no longer agree
        for name, value in (("visible", visible), ("full", full), ("shape", (seqlen_q, seqlen_k)), ("words", words)):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and unpickled ones are made anew, with words of their own and read-only arrays."""
        return BlockMask, (self.visible, self.full, self.shape, self.needs)


def make_block_mask(
    mask: Array | None = None,
    mask_mod: str | Callable[..., Any] | None = None,
    mod_args: dict[str, Any] | None = None,
    shape: Shape | None = None,
) -> BlockMask:
    """Find the blocks that a mask hides or shows wholly, once for many calls of :func:`attention`.

    The calls need the same `mask`, `mask_mod` and `mod_args` beside the block mask, for the blocks that are neither.

    Parameters
    ----------
    mask : array of bool, optional
        As for :func:`attention`; True where a query sees a key.
    mask_mod : str or callable, optional
        As for :func:`attention`. With both, a pair is seen if both allow it.
    mod_args : dict, optional
        What an expression uses beside.
    shape : (int, int, int, int), optional
        ``(B, Hq, M, N)``. Default: the shape of ``mask``.

    Returns
    -------
    BlockMask
        Of size 1 along batch and heads where nothing depends on them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a type, or has a shape, that is not allowed, or an expression does not compile.
    NotImplementedError, RuntimeError
        For an expression, as :func:`attention` does.

    Notes
    -----
    A mask is read 128 queries at a time, and a callable is asked for as many. Nothing of size M x N is made.

    References
    ----------
    J. Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", arXiv:2412.05496,
    section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> document = np.repeat(np.arange(4), 100)
    >>> def same_document(score, b, h, q_idx, kv_idx):
    ...     return document[q_idx] == document[kv_idx]
    >>> block_mask = cuflash.make_block_mask(mask_mod=same_document, shape=(1, 8, 400, 400))
    >>> block_mask.visible[0, 0].astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1],
           [0, 0, 1, 1]])
    >>> q = np.zeros((8, 400, 64), np.float32)
    >>> cuflash.attention(q, q, q, mask_mod=same_document, block_mask=block_mask).shape
    (8, 400, 64)
    """
    if mask_mod is None and (callable(mask) or isinstance(mask, str)):
        raise TypeError(f"mask: got {mask!r}; it must be an array of bool; is it mask_mod=?")
    arguments = _check_mods.arguments(mod_args)
    arrays = {} if mask is None else {"mask": mask}
    arrays |= {f"mod_args[{name!r}]": x for name, x in arguments.items() if not _check_mods.is_number(x)}
    backend = backend_of(*arrays.values(), names=tuple(arrays)) if arrays else _backend_without_arrays(mask_mod)
    mod = _check_mods.mod(backend.mod_kind, None, mask_mod, arguments)
    shape = _checked_shape(mask, mask_mod, shape)
    if not isinstance(mask_mod, str):
        visible, full = _blocks(mask, mask_mod, shape)
    else:
        # One entry stands for all of an axis that the expression does not name.
        batch, heads = (
            size if re.search(rf"\b{name}\b", mask_mod) else min(size, 1)
            for name, size in zip("bh", shape, strict=False)
        )
        visible, full = backend.make_block_mask(mod, arguments, (batch, heads, *shape[2:]))  # type: ignore[attr-defined]
        if mask is not None:
            mask_visible, mask_full = _blocks(mask, None, shape)
            visible, full = visible & mask_visible, full & mask_full
    needs = tuple(name for name, given in (("mask", mask), ("mask_mod", mask_mod)) if given is not None)
    return BlockMask(visible, full, shape[2:], needs)


def _checked_shape(mask: Any, mask_mod: Any, shape: Any) -> Shape:
    """The shape of the pairs, if the mask fits it."""
    if mask is None and mask_mod is None:
        raise ValueError("mask, mask_mod: both are None; at least one must be given")
    if shape is None and mask is None:
        raise ValueError("shape: got None without a mask; it must be (batch, heads, queries, keys)")
    if mask is not None:
        if mask.dtype != bool:
            raise TypeError(f"mask: dtype {mask.dtype} is not supported here; allowed: bool")
        if shape is None:
            shape = (1,) * (4 - mask.ndim) + mask.shape[-4:]
    checked: Shape = _checks.shape(shape, 4)
    if mask is not None and not _check_options.fits(mask.shape, checked):
        raise ValueError(f"mask: shape {mask.shape} does not broadcast to {checked}: (batch, heads, queries, keys)")
    return checked


def _backend_without_arrays(mask_mod: Any) -> Backend:
    """CuPy's on the current device for an expression; else NumPy's."""
    if not isinstance(mask_mod, str) or _backends.numpy_backend.mod_kind == "expression":
        return _backends.numpy_backend
    from . import _cupy

    try:
        device_id = _cupy.current_device_id()
    except RuntimeError as error:
        raise RuntimeError(f"mask_mod: an expression needs a GPU, a callable does not: {error}") from error
    return _cupy.backend_on(device_id)


def _blocks(mask: Array | None, mask_mod: Callable[..., Any] | None, shape: Shape) -> tuple[Array, Array]:
    """`visible` and `full` of a mask and a Python callable, from one row of blocks after the other."""
    batch, heads, seqlen_q, seqlen_k = shape
    b, h, kv_idx = np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None], np.arange(seqlen_k)
    if mask is not None:
        mask = _stretched(mask, shape)
    visible, full = [], []
    for start in range(0, max(seqlen_q, 1), BLOCK_SIZE):  # without queries one empty row, which is cut off below
        parts = []
        if mask is not None:
            parts.append(mask[:, :, start : start + BLOCK_SIZE])
        if mask_mod is not None:
            q_idx = np.arange(start, min(start + BLOCK_SIZE, seqlen_q))[:, None]
            shown = mask_mod(None, *_check_mods.read_only(b, h, q_idx, kv_idx))
            parts.append(_as_pairs(shown, (batch, heads, len(q_idx), seqlen_k)))
        seen = reduce(np.logical_and, parts)
        visible.append(_cut(seen.any(axis=2), BLOCK_SIZE, False).any(axis=-1))
        full.append(_cut(seen.all(axis=2), BLOCK_SIZE, True).all(axis=-1))
    rows = ceil_div(seqlen_q, BLOCK_SIZE)
    return np.stack(visible, axis=2)[:, :, :rows], np.stack(full, axis=2)[:, :, :rows]


def _as_pairs(shown: Any, shape: Shape) -> Array:
    """What a mask_mod returned, as bool of axes (batch or 1, heads or 1, queries, keys)."""
    shown = np.asarray(shown)
    if not _check_options.fits(shown.shape, shape):
        raise ValueError(f"mask_mod: returned shape {shown.shape}, which does not broadcast to {shape}")
    _check_mods.returned("mask_mod", shown)
    return _stretched(shown.astype(bool), shape)


def _stretched(pairs: Array, shape: Shape) -> Array:
    """What broadcasts to this shape, with all queries and keys; batch and heads may stay 1."""
    pairs = pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape)
    return np.broadcast_to(pairs, (*pairs.shape[:2], *shape[2:]))


def _packed(blocks: Array) -> Array:
    """Flags along the last axis as bits of uint32 words, the first flag as the lowest bit; no keys have a word too."""
    if blocks.shape[-1] == 0:  # kernels look at the first block of keys in any case
        blocks = np.full_like(blocks, False, shape=(*blocks.shape[:-1], 1))
    bits = _cut(blocks, WORD_BITS, False).astype(np.uint32)
    return reduce(np.bitwise_or, (bits[..., bit] << bit for bit in range(WORD_BITS))).copy()  # in C order


def _cut(x: Array, size: int, filler: bool) -> Array:
    """The last axis in pieces of this size, as two axes; what is missing is filled up."""
    pieces = ceil_div(x.shape[-1], size)
    ends = np.full_like(x, filler, shape=(*x.shape[:-1], pieces * size - x.shape[-1]))
    return np.concatenate([x, ends], axis=-1).reshape(*x.shape[:-1], pieces, size)
