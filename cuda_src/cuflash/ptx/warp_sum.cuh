// The sum of what the lanes of a warp hold.
#pragma once

#include <cuflash/common/math.cuh>

namespace cuflash::ptx {

__device__ __forceinline__ int warp_sum(int x) {
#if __CUDA_ARCH__ >= 800
  return static_cast<int>(__reduce_add_sync(kFullMask, static_cast<unsigned>(x)));
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
#endif
}

}  // namespace cuflash::ptx
