// The 32-bit address that PTX instructions on shared memory take.
#pragma once

namespace cuflash::ptx {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace cuflash::ptx
