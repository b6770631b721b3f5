// Stores and additions that the compiler does not split.
#pragma once

namespace cuflash::ptx {

// 8 or 16 bytes to an aligned address in global memory.
__device__ __forceinline__ void store(void* global, const unsigned (&x)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(x[0]), "r"(x[1]) : "memory");
}
__device__ __forceinline__ void store(void* global, const unsigned (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Adds four floats to those at an aligned address (sm_90).
__device__ __forceinline__ void add_16(float4* global, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}

}  // namespace cuflash::ptx
