// How warpgroups add their parts of dQ to sums in global memory.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/ptx/bulk_add.cuh>
#include <cuflash/ptx/store.cuh>
#include <cuflash/ptx/tma.cuh>
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

  __device__ __forceinline__ void pass_turn() const {
    meet();  // all have added
    if (thread == 0) ptx::add_release(turn, 1);
  }

 private:
  __device__ __forceinline__ void meet() const { ptx::named_barrier_sync(kFirstBarrier + consumer, 128); }

  static constexpr int kFirstBarrier = 14;  // kernels count theirs from 1
};

}  // namespace cuflash
