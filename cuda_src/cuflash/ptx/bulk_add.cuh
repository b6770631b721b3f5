// Additions by the copy engine, of floats in shared memory to those in global memory (sm_90).
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

// Starts to add so many bytes, a multiple of 16. What threads wrote to shared memory is seen after async_proxy_fence.
__device__ __forceinline__ void bulk_add(float4* global, const void* shared, int num_bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(num_bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until what this thread has started is read, so that shared memory may change.
__device__ __forceinline__ void bulk_add_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace cuflash::ptx
