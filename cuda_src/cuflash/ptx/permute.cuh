// Bytes of two registers in any order.
#pragma once

namespace cuflash::ptx {

// Each of the four digits of the selector is the number of a byte, those of y from 4 on, plus 8 for its highest bit in
// place of all bits.
__device__ __forceinline__ unsigned permute(unsigned x, unsigned y, unsigned selector) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(x), "r"(y), "r"(selector));
  return bytes;
}

}  // namespace cuflash::ptx
