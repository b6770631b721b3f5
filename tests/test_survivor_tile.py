"""Survivors of dropout that warps of the Hopper backward draw for others: those that cuflash.dropout_mask tells."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import cuflash
from cuflash._device import KernelSource
from cuflash._options import Options
from cuflash._problem import Problem
from tests.hostcuda import HostDevice

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host ring needs g++"),
]

# Four warps draw; then each looks at its 16 keys: first as an element that survives or not, then as half of a mask.
SOURCE = """\
#include <cuflash/attention/survivor_tile.cuh>
{options}
extern "C" __global__ void kernel(unsigned char* kept, const __grid_constant__ Options options) {{
  constexpr int kBlockM = {block_m}, kBlockN = {block_n};
  __shared__ cuflash::SurvivorTile<kBlockM, kBlockN> tile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Options here = options;
  here.dropout.batch = 1;
  here.dropout.head = 2;
  if (threadIdx.x == 0) tile.keys.fill(here.dropout.key_of_seed());
  __syncthreads();
  if (warp < 4) tile.draw<4>(here.dropout, {first_query}, {first_key}, warp);
  __syncthreads();
  const auto survives = tile.of_keys(16 * warp, lane);
  for (int i = 0; i < kBlockM / 2; ++i) {{
    const int query = i / 4 * 8 + lane % 4 * 2 + i % 2, key = 16 * warp + i / 2 % 2 * 8 + lane / 4;
    const unsigned half = survives.pair(i / 2 * 2) >> 16 * (i % 2) & 0xffff;
    kept[query * kBlockN + key] = survives(i) + (half == 0xffff ? 2 : half);
  }}
}}
"""


@pytest.mark.parametrize("dropout_p", [0.3, 0.83])  # survivors are above the threshold, and below it
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (64, 128), (128, 128)])
def test_survivors_drawn_ahead_are_those_of_the_documentation(dropout_p: float, block_m: int, block_n: int) -> None:
    problem = Problem("float16", 2, 3, 3, 512, 512, 64, 64, 1.0, dropout_p=dropout_p)
    options, seed, first_query, first_key = Options.of(problem, {}), 2**40 + 7, 2 * block_m, 3 * block_n
    places = {"block_m": block_m, "block_n": block_n, "first_query": first_query, "first_key": first_key}
    source = KernelSource("kernel", SOURCE.format(options=options.code, **places), 2 * block_n, 0)
    kept = np.full((block_m, block_n), 9, np.uint8)
    (launch,) = HostDevice().load([source])
    launch(1, (kept, options.fill({"seed": seed}, lambda _: 0)))
    expected = cuflash.dropout_mask((2, 3, 512, 512), dropout_p, seed)[1, 2]
    tile = expected[first_query : first_query + block_m, first_key : first_key + block_n]
    np.testing.assert_array_equal(kept, np.where(tile, 3, 0))
