// Shadows <cuflash/ptx/cluster.cuh>: the scheduler runs the blocks of a cluster side by side.
#pragma once

#include <cuflash/ptx/mbarrier.cuh>
#include <cuflash/ptx/tma.cuh>

namespace cuflash::ptx {

inline int cluster_rank() { return static_cast<int>(hostcuda::block->index - hostcuda::cluster[0]->index); }

// Calls work(offset) as if by the block of this rank, whose shared memory lies so many bytes after that of this one.
template <class Work>
inline void in_block(int rank, Work work) {
  hostcuda::Block* const mine = hostcuda::block;
  hostcuda::block = hostcuda::cluster.at(rank);
  work(hostcuda::block->shared_memory - mine->shared_memory);
  hostcuda::block = mine;
}

template <class T>
inline T* moved(T* pointer, ptrdiff_t num_bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(pointer) + num_bytes);
}

// Counted by the first block.
inline void cluster_sync(hostcuda::Site site = hostcuda::Site::here()) {
  int* const num_arrived = &hostcuda::cluster[0]->num_arrived_in_cluster;
  hostcuda::current->fiber->release(num_arrived);
  if (++*num_arrived < static_cast<int>(blockDim.x * hostcuda::cluster.size())) {
    return hostcuda::sleep_until(num_arrived, "barrier.cluster", site);
  }
  *num_arrived = 0;
  hostcuda::current->fiber->acquire(num_arrived);
  for (int rank = 0; rank < static_cast<int>(hostcuda::cluster.size()); ++rank) {
    in_block(rank, [&](ptrdiff_t) { hostcuda::wake(num_arrived); });
  }
}

inline void barrier_arrive_at(Barrier* barrier, int rank, hostcuda::Site site = hostcuda::Site::here()) {
  in_block(rank, [&](ptrdiff_t offset) { barrier_arrive(moved(barrier, offset), site); });
}

inline void tma_load_to_all(void* shared, const TensorMap* map, Barrier* barrier, int x0, int x1, int x2, int x3,
                            unsigned short blocks, hostcuda::Site site = hostcuda::Site::here()) {
  for (int rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    in_block(rank, [&](ptrdiff_t offset) {
      auto* const target = static_cast<unsigned char*>(shared);
      tma_load(moved(target, offset), map, moved(barrier, offset), x0, x1, x2, x3, site);
    });
  }
}

}  // namespace cuflash::ptx
