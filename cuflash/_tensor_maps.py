"""Tensor maps: how Hopper's copy engine (TMA) sees the arrays of a call, made once for each set of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._device import Array, Device
from ._problem import Operand

PANEL = 64  # columns of a 128-byte row, which TMA copies at once
VECTOR = 8  # elements of 16 bytes, the unit of TMA's strides
MAX_KEPT = 256
"""Sets of arrays whose tensor maps a plan keeps."""


class MappedParams:
    """The parameters of a kernel that reads arrays by TMA.

    Parameters
    ----------
    device : Device
        Where it runs.
    number : str
        The dtype of the arrays.
    params : numpy.ndarray
        The struct of size 1; the addresses of the arrays, by their names, and `maps` are filled in by each call.
    operands : mapping
        The arrays, by their names.
    rows : mapping
        How many rows a box of each array has, in the order of the maps.
    """

    def __init__(
        self,
        device: Device,
        number: str,
        params: np.ndarray[Any, Any],
        operands: Mapping[str, Operand],
        rows: Mapping[str, int],
    ) -> None:
        self._device, self._number, self._params = device, number, params
        self._shapes = {name: (_shape(operands[name]), _strides(operands[name]), (PANEL, rows[name])) for name in rows}
        self._kept: dict[tuple[int, ...], Any] = {}

    def __call__(self, *arrays: Array) -> Any:
        """What to pass to the kernel for these arrays."""
        addresses = self._device.addresses(*arrays)
        struct = self._kept.get(addresses)
        if struct is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            struct = self._kept[addresses] = self._filled(addresses)
        return struct

    def _filled(self, addresses: tuple[int, ...]) -> Any:
        filled = self._params.copy()
        boxes = []
        for address, (name, (shape, strides, box)) in zip(addresses, self._shapes.items(), strict=True):
            filled[name] = address
            boxes.append((address, shape, strides, box))
        filled["maps"] = self._device.tensor_maps(boxes, self._number)
        return self._device.struct(filled)


def why_not_array(name: str, array: Operand) -> str | None:
    """The reason why TMA cannot read an array, or 16-byte stores cannot write it, or None if they can."""
    *outer, (cols, col_stride) = zip(array.shape, array.strides, strict=True)
    if col_stride != 1 and cols > 1:
        return f"{name}: its last axis is not contiguous"
    if cols % VECTOR or not array.aligned or any(stride % VECTOR for size, stride in outer if size > 1):
        return f"{name}: its rows do not begin at multiples of 16 bytes"
    if any(not 0 <= stride < 2**39 for size, stride in outer if size > 1) or _repeats_rows(array):
        return f"{name}: its strides are negative, too large for TMA, or repeat rows"
    return None


def _repeats_rows(array: Operand) -> bool:
    return array.strides[2] == 0 and array.shape[2] > 1


def _shape(array: Operand) -> tuple[int, int, int, int]:
    """The shape of an array as TMA sees it, innermost first: axes along which it is broadcast have one entry."""
    sizes = [size if stride else 1 for size, stride in zip(array.shape, array.strides, strict=True)]
    return array.shape[3], array.shape[2], sizes[1], sizes[0]


def _strides(array: Operand) -> tuple[int, int, int]:
    """The strides of the three outer axes in elements; of axes with one entry, any that TMA takes."""
    batch, heads, rows, _ = (stride if size > 1 and stride else VECTOR for size, stride in zip(*array[:2], strict=True))
    return rows, heads, batch
