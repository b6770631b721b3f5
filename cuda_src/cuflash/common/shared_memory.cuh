// The dynamic shared memory of a block.
#pragma once

namespace cuflash {

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return shared_memory;
}

}  // namespace cuflash
