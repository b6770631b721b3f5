// Shadows <cuflash/common/shared_memory.cuh>.
#pragma once

namespace cuflash {

inline unsigned char* dynamic_shared_memory() { return hostcuda::block->shared_memory; }

}  // namespace cuflash
