"""Rows that lanes write together, 8 or 16 bytes each, without the kernels around them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from cuflash._device import KernelSource
from tests.hostcuda import HostDevice

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host ring needs g++"),
]

# Each number says where it belongs; the second row of a lane is halved.
SOURCE = """\
#include <cuflash/tile/row_store.cuh>
extern "C" __global__ void kernel(__half* out, bool* finite) {{
  const int lane = threadIdx.x;
  cuflash::WarpgroupTile<64> tile;
  for (int i = 0; i < tile.kNumElements; ++i) {{
    const int row = lane / 4 + 8 * cuflash::row_of_element(i), col = lane % 4 * 2 + cuflash::col_of_element(i);
    tile.x[i] = 64 * row + col == {infinite} ? cuflash::infinity() : 64 * row + col;
  }}
  const float factor[2] = {{1.0f, 0.5f}};
  const cuflash::Matrix<__half> matrix(out, {{0, 0, 64, 1}}, 0, 0, 0, {rows}, {cols});
  finite[lane] = cuflash::store_vectorized_rows<{lane_bytes}>(matrix, tile, factor, lane / 4);
}}
"""


@pytest.mark.parametrize("lane_bytes", [8, 16])
@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (13, 40), (5, 8)])
@pytest.mark.parametrize("infinite", [-1, 3 * 64 + 5])
def test_lanes_write_the_rows_of_a_tile_and_nothing_else(lane_bytes: int, rows: int, cols: int, infinite: int) -> None:
    out, finite = np.full((16, 64), -1, np.float16), np.zeros(32, bool)
    source = SOURCE.format(lane_bytes=lane_bytes, rows=rows, cols=cols, infinite=infinite)

    (launch,) = HostDevice().load([KernelSource("kernel", source, 32, 0)])
    launch(1, (out, finite))

    tile = np.arange(16 * 64.0).reshape(16, 64) * np.repeat([1, 0.5], 8)[:, None]
    tile.flat[[infinite] if infinite >= 0 else []] = np.inf
    expected = np.full((16, 64), -1.0)
    expected[:rows, :cols] = tile[:rows, :cols]
    np.testing.assert_array_equal(out, expected)
    lanes = np.flatnonzero(~finite)
    assert lanes.tolist() == ([4 * 3 + 5 // 2] if infinite >= 0 else [])  # of row 3 and columns 4 and 5
