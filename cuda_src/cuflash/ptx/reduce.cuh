// Sums in global memory to which many blocks add.
#pragma once

#include <cuflash/ptx/store.cuh>

namespace cuflash::ptx {

// Adds four floats, in an order among threads that changes from run to run. Lane l of a warp owns the numbers
// 4 l to 4 l + 3 of 128 on sm_90 and up, which add 16 bytes at once; before, l, l + 32, l + 64 and l + 96.
__device__ __forceinline__ void add_4(float* sums, const float* x) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  add_16(reinterpret_cast<float4*>(sums) + lane, x[0], x[1], x[2], x[3]);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sums + lane + 32 * i), "f"(x[i]) : "memory");
  }
#endif
}

// Reads what a lane owns.
__device__ __forceinline__ void load_4(float* x, const float* sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if __CUDA_ARCH__ >= 900
    x[i] = sums[4 * lane + i];
#else
    x[i] = sums[lane + 32 * i];
#endif
  }
}

}  // namespace cuflash::ptx
