// Hiding a value from the optimiser.
#pragma once

namespace cuflash::ptx {

// What is computed from the value afterwards is computed anew, not kept in registers from before.
__device__ __forceinline__ void make_opaque(unsigned& value) { asm volatile("" : "+r"(value)); }
template <class T>
__device__ __forceinline__ void make_opaque(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

}  // namespace cuflash::ptx
