// __syncthreads, and its variants that count votes.
#pragma once

#include "hostcuda/thread.h"

namespace hostcuda {

// Waits for all threads of the block that have not exited; returns how many of them voted.
int block_barrier(const char* operation, Site site, bool vote = false);

// Called when a thread arrives or exits.
void release_barrier_if_complete();

}  // namespace hostcuda

inline void __syncthreads(hostcuda::Site site = hostcuda::Site::here()) {
  hostcuda::block_barrier("__syncthreads", site);
}
inline int __syncthreads_count(int predicate, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::block_barrier("__syncthreads_count", site, predicate != 0);
}
inline int __syncthreads_or(int predicate, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::block_barrier("__syncthreads_or", site, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::block_barrier("__syncthreads_and", site, predicate == 0) == 0;
}
