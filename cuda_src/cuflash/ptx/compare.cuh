// Comparisons of two numbers at once.
#pragma once

namespace cuflash::ptx {

// Halves of a register as float16: all ones where that of x is less than that of y, 0 elsewhere and beside NaN.
__device__ __forceinline__ unsigned less_2(unsigned x, unsigned y) {
  unsigned mask;
  asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(y));
  return mask;
}

}  // namespace cuflash::ptx
