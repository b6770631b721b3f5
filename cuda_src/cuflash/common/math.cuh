// Small arithmetic that CUDA C++ lacks without the standard library.
#pragma once

namespace cuflash {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.442695040888963407f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// What lane 0 holds, for the whole warp. Where all lanes hold the same, the compiler learns it.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kFullMask, x, 0); }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

}  // namespace cuflash
