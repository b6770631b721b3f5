// How warpgroups add their parts of dQ to sums in global memory.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/ptx/store.cuh>
#include <cuflash/ptx/turn.cuh>
#include <cuflash/ptx/warpgroup.cuh>

namespace cuflash {

// One part of one tile of queries, for one block of keys. In a fixed order, if need be: the last keys first. They begin
// with the latest queries, so that blocks seldom wait, and only for jobs that were taken before.
template <class Options, int kHeadDim, int kBlockM, int kBlockN>
struct QuerySums {
  using Layout = QueryGradient<kHeadDim, kBlockM>;

  float4* pieces;  // of this thread
  unsigned* turn;
  unsigned before;  // blocks that add earlier
  int part;

  template <class Walk>
  __device__ __forceinline__ QuerySums(float* sums, unsigned* turns, const Problem& problem, const Job& job,
                                       const Band& band, const Walk& walk, int part)
      : part(part) {
    const long long tile = Options::template query_tile<kBlockM>(problem, job.sequence, walk.head, walk.block);
    pieces = Layout::pieces(sums, tile, part, threadIdx.x % 128);
    turn = turns + tile * 2 + part;
    before = (band.keys_of({walk.block * kBlockM, (walk.block + 1) * kBlockM}).end - 1) / kBlockN - job.tile;
  }

  __device__ __forceinline__ void await_turn() const {
    while (threadIdx.x % 128 == 0 && ptx::load_acquire(turn) != before) {
    }
    meet();
  }

  // Columns of the part, from this one on.
  template <int kCols>
  __device__ __forceinline__ void add(const WarpgroupTile<kCols>& dq, int first_col = 0) const {
#pragma unroll
    for (int i = 0; i < kCols / 8; ++i) {
      float4* const piece = pieces + (first_col / 8 + i) * 128;
      ptx::add_16(piece, dq.x[4 * i], dq.x[4 * i + 1], dq.x[4 * i + 2], dq.x[4 * i + 3]);
    }
  }

  __device__ __forceinline__ void pass_turn() const {
    meet();  // all have added
    if (threadIdx.x % 128 == 0) ptx::add_release(turn, 1);
  }

 private:
  __device__ __forceinline__ void meet() const { ptx::named_barrier_sync(kFirstBarrier + part, 128); }

  static constexpr int kFirstBarrier = 14;  // kernels count theirs from 1
};

}  // namespace cuflash
