// TMA: the engine that copies boxes of a tensor between global and shared memory (sm_90).
#pragma once

#include <cuflash/ptx/mbarrier.cuh>

namespace cuflash::ptx {

// What cuTensorMapEncodeTiled writes: address, shape, strides, box and swizzle of a tensor.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts to copy the box at these coordinates, innermost first; zeros stand for what lies outside of the tensor.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, Barrier* barrier, int x0, int x1, int x2,
                                         int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// What this thread wrote to shared memory is seen by the copy engine and the tensor cores after the next barrier.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace cuflash::ptx
