// Words from shared memory.
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

__device__ __forceinline__ unsigned load_shared(SharedAddress address) {
  unsigned word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

}  // namespace cuflash::ptx
