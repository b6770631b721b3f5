// What the lanes of a warp hold, put together.
#pragma once

#include <cuflash/common/math.cuh>

namespace cuflash::ptx {

// sm_80 has one instruction for each.
__device__ __forceinline__ int warp_sum(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullMask, x);
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
#endif
}
__device__ __forceinline__ int warp_max(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullMask, x);
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(kFullMask, x, distance));
  return x;
#endif
}

}  // namespace cuflash::ptx
