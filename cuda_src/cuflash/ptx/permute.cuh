// Bytes of a register in another order.
#pragma once

namespace cuflash::ptx {

// Each of the four digits of the selector is the number of a byte of x, plus 8 for its highest bit in place of all.
__device__ __forceinline__ unsigned permute(unsigned x, unsigned selector) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(x), "r"(selector));
  return bytes;
}

}  // namespace cuflash::ptx
