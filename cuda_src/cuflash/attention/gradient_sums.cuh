// Where sums of gradients lie that many blocks add to: tiles of rows, one sequence behind the other, each with all
// heads.
#pragma once

#include <cuflash/attention/sequence.cuh>

namespace cuflash {

// The number of a sequence's first tile; packed sequences begin like their jobs (attention/packed.cuh).
template <int kBlockM, class Options>
__device__ __forceinline__ int first_tile_of_sums(const Problem& problem, const Sequence& sequence) {
  if constexpr (Options::kPacked) {
    return sequence.first_query / kBlockM + sequence.batch + sequence.padding;
  } else {
    return sequence.batch * ceil_div(problem.seqlen_q, kBlockM);
  }
}

}  // namespace cuflash
