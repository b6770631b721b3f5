// Shadows <cuflash/ptx/reduce.cuh>.
#pragma once

namespace cuflash::ptx {

inline void add_4(float* sums, const float* x) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) atomicAdd(sums + lane + 32 * i, x[i]);
}

inline void load_4(float* x, const float* sums) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) x[i] = sums[lane + 32 * i];
}

}  // namespace cuflash::ptx
