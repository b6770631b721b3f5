// How warpgroups add their parts of dQ to sums in global memory.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/ptx/store.cuh>
#include <cuflash/ptx/turn.cuh>
#include <cuflash/ptx/warpgroup.cuh>

namespace cuflash {

// What one of two consumers adds to one tile of queries, for one block of keys. In a fixed order, if need be: the last
// keys first. They begin with the latest queries, so that blocks seldom wait, and only for jobs that were taken before.
template <class Options, int kHeadDim, int kBlockM, int kBlockN>
struct QuerySums {
  using Layout = QueryGradient<kHeadDim, kBlockM>;

  float* sums;
  long long tile;
  unsigned* turn;
  unsigned before;       // blocks that add earlier
  int consumer, thread;  // of two, and of its 128

  template <class Walk>
  __device__ __forceinline__ QuerySums(float* sums, unsigned* turns, const Problem& problem, const Job& job,
                                       const Band& band, const Walk& walk, int consumer, int thread)
      : sums(sums),
        tile(Options::template query_tile<kBlockM>(problem, job.sequence, walk.head, walk.block)),
        consumer(consumer),
        thread(thread) {
    turn = turns + tile * 2 + consumer;
    before = (band.keys_of({walk.block * kBlockM, (walk.block + 1) * kBlockM}).end - 1) / kBlockN - job.tile;
  }

  __device__ __forceinline__ void await_turn() const {
    while (thread == 0 && ptx::load_acquire(turn) != before) {
    }
    meet();
  }

  // Adds pieces of a part, from one to another.
  template <int kBegin = 0, int kEnd = Layout::kPieces>
  __device__ __forceinline__ void add(int part, const typename Layout::Part& dq) const {
    float4* const pieces = Layout::pieces(sums, tile, part, thread);
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      ptx::add_16(pieces + i * 128, dq.x[4 * i], dq.x[4 * i + 1], dq.x[4 * i + 2], dq.x[4 * i + 3]);
    }
  }

  __device__ __forceinline__ void pass_turn() const {
    meet();  // all have added
    if (thread == 0) ptx::add_release(turn, 1);
  }

 private:
  __device__ __forceinline__ void meet() const { ptx::named_barrier_sync(kFirstBarrier + consumer, 128); }

  static constexpr int kFirstBarrier = 14;  // kernels count theirs from 1
};

}  // namespace cuflash
