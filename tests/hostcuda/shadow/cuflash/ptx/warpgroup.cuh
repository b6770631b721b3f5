// Shadows <cuflash/ptx/warpgroup.cuh>: a host has registers enough.
#pragma once

namespace cuflash::ptx {

template <int kCount>
inline void release_registers() {}
template <int kCount>
inline void acquire_registers() {}

// Whether this thread is the last that the barrier waits for; then the others go on.
inline bool arrive_at_named_barrier(int* num_arrived, int num_threads) {
  hostcuda::current->fiber->release(num_arrived);
  if (++*num_arrived < num_threads) return false;
  *num_arrived = 0;
  hostcuda::wake(num_arrived);
  return true;
}

inline void named_barrier_sync(int name, int num_threads, hostcuda::Site site = hostcuda::Site::here()) {
  int* const num_arrived = &hostcuda::block->num_arrived_at[name];
  if (arrive_at_named_barrier(num_arrived, num_threads)) {
    hostcuda::current->fiber->acquire(num_arrived);
  } else {
    hostcuda::sleep_until(num_arrived, "bar.sync", site);
  }
}

inline void named_barrier_arrive(int name, int num_threads) {
  arrive_at_named_barrier(&hostcuda::block->num_arrived_at[name], num_threads);
}

}  // namespace cuflash::ptx
