// Clusters: blocks of threads that run side by side and reach each other's shared memory (sm_90).
#pragma once

#include <cuflash/ptx/mbarrier.cuh>
#include <cuflash/ptx/tma.cuh>

namespace cuflash::ptx {

// The number of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // those of a warp must come together
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Arrives at the barrier that lies at the same place in the shared memory of a block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::
          "r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// The same as tma_load, to the same place of each block whose bit is set; each has its own barrier count the bytes.
__device__ __forceinline__ void tma_load_to_all(void* shared, const TensorMap* map, Barrier* barrier, int x0, int x1,
                                                int x2, int x3, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "h"(blocks)
      : "memory");
}

}  // namespace cuflash::ptx
