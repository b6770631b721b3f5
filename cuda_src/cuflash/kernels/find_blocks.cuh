// Which blocks of 128 queries and 128 keys hold visible pairs, found once for many calls.
#pragma once

#include <cuflash/attention/options.cuh>

namespace cuflash {

// A block of threads asks the options about each pair of one block of one batch entry and head.
template <class Options, int kNumWarps>
struct FindBlocks {
  using Element = bool;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlock = 128;

  struct Arrays {
    Element *visible, *full;  // (batch, num_heads, blocks of queries, blocks of keys), contiguous
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const FwdParams& params, Options options) {
    const Problem& problem = params.problem;
    const int blocks_q = ceil_div(problem.seqlen_q, kBlock), blocks_k = ceil_div(problem.seqlen_k, kBlock);
    const int first_key = blockIdx.x % blocks_k * kBlock, first_query = blockIdx.x / blocks_k % blocks_q * kBlock;
    const int number = blockIdx.x / blocks_k / blocks_q;
    options.enter(BatchedSequences::sequence(problem, number / problem.num_heads), number % problem.num_heads);

    bool some = false, every = true;
    for (int pair = threadIdx.x; pair < kBlock * kBlock; pair += kNumThreads) {
      const int query = first_query + pair / kBlock, key = first_key + pair % kBlock;
      if (query >= problem.seqlen_q || key >= problem.seqlen_k) continue;
      const bool visible = options.visible(query, key);
      some = some || visible;
      every = every && visible;
    }
    some = __syncthreads_or(some);
    every = !__syncthreads_or(!every);
    if (threadIdx.x == 0) {
      arrays.visible[blockIdx.x] = some;
      arrays.full[blockIdx.x] = every;
    }
  }
};

}  // namespace cuflash
