// What the Hopper backward takes: the problem, and where its inputs are.
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/ptx/tma.cuh>

namespace cuflash {

// Where TMA finds the inputs, and in boxes of which sizes.
struct BwdMaps {
  ptx::TensorMap q, k, v, dout;
};

// One struct, because each argument costs the host time (mirrored in cuflash/_params.py).
struct BwdSm90Params {
  BwdParams bwd;
  const void *q, *k, *v, *dout;  // where the host has filled in the maps
  BwdMaps maps;
};

}  // namespace cuflash
