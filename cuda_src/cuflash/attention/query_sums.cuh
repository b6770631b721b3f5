// How warpgroups add their parts of dQ to sums in global memory.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/ptx/store.cuh>

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
  template <int kBegin = 0, int kEnd = Layout::kPieces>
  __device__ __forceinline__ void add(int part, const typename Layout::Part& dq) const {
    float4* const pieces = Layout::pieces(sums, tile, part, thread);
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::add_16(pieces + i * 128, dq.x[4 * i], dq.x[4 * i + 1], dq.x[4 * i + 2], dq.x[4 * i + 3]);
    }
  }
};

}  // namespace cuflash
