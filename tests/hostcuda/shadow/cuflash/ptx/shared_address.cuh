// Shadows <cuflash/ptx/shared_address.cuh>: an address is an address.
#pragma once

namespace cuflash::ptx {

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace cuflash::ptx
