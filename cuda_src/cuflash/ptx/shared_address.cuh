// The 32-bit address that PTX instructions on shared memory take.
#pragma once

namespace cuflash::ptx {

using SharedAddress = unsigned;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace cuflash::ptx
