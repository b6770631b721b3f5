// Shadows <cuflash/ptx/reduce.cuh>.
#pragma once

namespace cuflash::ptx {

template <class T>
T* of_lane(T* sums) {
  return sums + threadIdx.x % 32;
}

inline void add_4(float* first, const float* x) {
  for (int i = 0; i < 4; ++i) atomicAdd(first + 32 * i, x[i]);
}

inline void load_4(float* x, const float* first) {
  for (int i = 0; i < 4; ++i) x[i] = first[32 * i];
}

}  // namespace cuflash::ptx
