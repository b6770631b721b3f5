// What warpgroups of a block arrange among themselves: registers and turns (sm_90a).
#pragma once

namespace cuflash::ptx {

// From now on each thread of the warpgroup has this many registers: the rest goes back to the block,
template <int kCount>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
// or more come from what others gave back.
template <int kCount>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Named barriers: waits until so many threads have come to this one, or comes and goes on.
__device__ __forceinline__ void named_barrier_sync(int name, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int name, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(num_threads) : "memory");
}

}  // namespace cuflash::ptx
