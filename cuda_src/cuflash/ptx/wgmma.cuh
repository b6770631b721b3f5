// wgmma: products of a warpgroup's tiles, run by the tensor cores while the threads go on (sm_90a).
#pragma once

namespace cuflash::ptx {

// Where a tile lies in shared memory, and how (PTX ISA, "Matrix descriptor").
using TileDescriptor = unsigned long long;

// sum (64 x kWidth) = a (64 x 16) * b (16 x kWidth), plus the sum before if `add`, by two functions:
//   multiply<kAcrossA, kAcrossB>(sum, a, b, add) with a in shared memory,
//   multiply<kAcrossB>(sum, a, b, add) with a in registers.
// The depth of a and of b lies along the rows of memory, or across them if so said. The instruction names every
// register, so each width is a specialisation; cuflash/_wgmma.py writes those that a kernel needs.
template <class Element, int kWidth>
struct Wgmma;

// Registers written before are seen by the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products started since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are still at work.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace cuflash::ptx
