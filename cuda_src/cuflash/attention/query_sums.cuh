// How warpgroups add their parts of dQ to sums in global memory.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/ptx/bulk_add.cuh>
#include <cuflash/ptx/store.cuh>
#include <cuflash/ptx/tma.cuh>

namespace cuflash {

// What one of two consumers adds to one tile of queries, for one block of keys: in any order.
template <class Options, int kHeadDim, int kBlockM>
struct QuerySums {
  using Layout = QueryGradient<kHeadDim, kBlockM>;

  float* sums;
  long long tile;
  int thread;  // of the consumer's 128

  template <class Walk>
  __device__ __forceinline__ QuerySums(float* sums, const Problem& problem, const Job& job, const Walk& walk,
                                       int thread)
      : sums(sums),
        tile(Options::template query_tile<kBlockM>(problem, job.sequence, walk.head, walk.block)),
        thread(thread) {}

  // Adds pieces of a part, from one to another.
  template <int kBegin, int kEnd = Layout::kPieces>
  __device__ __forceinline__ void add(int part, const typename Layout::Part& dq) const {
    float4* const pieces = Layout::pieces(sums, tile, part, thread);
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::add_16(pieces + i * 32, dq.x[4 * i], dq.x[4 * i + 1], dq.x[4 * i + 2], dq.x[4 * i + 3]);
    }
  }

  // Adds the first pieces of a part by way of memory that this warp has for itself: the copy engine waits, not the
  // warp.
  template <int kEnd>
  __device__ __forceinline__ void add_staged(void* memory, int part, const typename Layout::Part& dq) const {
    const int lane = thread % 32;
    float4* const staged = static_cast<float4*>(memory);
#pragma unroll
    for (int i = 0; i < kEnd; ++i) {
      staged[i * 32 + lane] = make_float4(dq.x[4 * i], dq.x[4 * i + 1], dq.x[4 * i + 2], dq.x[4 * i + 3]);
    }
    ptx::async_proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::bulk_add(Layout::pieces(sums, tile, part, thread), memory, kEnd * 32 * sizeof(float4));
  }
};

}  // namespace cuflash
