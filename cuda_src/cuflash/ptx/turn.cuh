// Numbers in global memory by which blocks of threads take turns.
#pragma once

namespace cuflash::ptx {

// What others wrote before they raised the number is seen by those who read it.
__device__ __forceinline__ unsigned load_acquire(const unsigned* number) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(unsigned* number, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(number), "r"(x) : "memory");
}

}  // namespace cuflash::ptx
