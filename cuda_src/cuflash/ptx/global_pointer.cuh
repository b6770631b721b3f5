// Tells the compiler that a pointer is one to global memory, where it cannot see that: pointers that come from shared
// memory may be anything.
#pragma once

namespace cuflash::ptx {

template <class T>
__device__ __forceinline__ const T* global_pointer(const T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

}  // namespace cuflash::ptx
