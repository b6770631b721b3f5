// Sums in global memory to which many blocks add.
#pragma once

#include <cuflash/ptx/store.cuh>

namespace cuflash::ptx {

// The first of the four numbers that a lane owns of 128: lane l owns 4 l to 4 l + 3 on sm_90 and up, which add 16 bytes
// at once; before, l, l + 32, l + 64 and l + 96.
template <class T>
__device__ __forceinline__ T* of_lane(T* sums) {
#if __CUDA_ARCH__ >= 900
  return sums + threadIdx.x % 32 * 4;
#else
  return sums + threadIdx.x % 32;
#endif
}

// Adds to what a lane owns, in an order among threads that changes from run to run.
__device__ __forceinline__ void add_4(float* first, const float* x) {
#if __CUDA_ARCH__ >= 900
  add_16(reinterpret_cast<float4*>(first), x[0], x[1], x[2], x[3]);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(first + 32 * i), "f"(x[i]) : "memory");
  }
#endif
}

// Reads what a lane owns.
__device__ __forceinline__ void load_4(float* x, const float* first) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if __CUDA_ARCH__ >= 900
    x[i] = first[i];
#else
    x[i] = first[32 * i];
#endif
  }
}

}  // namespace cuflash::ptx
