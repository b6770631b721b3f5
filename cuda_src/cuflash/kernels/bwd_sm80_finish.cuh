// The end of the backward on mma.sync: the gradient of Q, out of the sums of bwd_sm80_dkdv.cuh.
#pragma once

#include <cuflash/attention/careful_gradients.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/global_sums.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block has a tile of sums, and the same warps that added to it.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kNumWarps>
struct BwdSm80Finish {
  using Element = typename Number::Element;
  using Sums = GlobalSums<kBlockM, kHeadDim, kNumWarps>;
  using Careful = CarefulGradients<Element, Options>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = kNumWarps * sizeof(typename Careful::Memory);

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element* dq;
    const float* dq_sums;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, const Options& options) {
    const Problem& problem = params.problem;
    const Job job = options.template query_job<kBlockM>(problem, blockIdx.x);
    const Sequence& sequence = job.sequence;
    const int block_query = job.tile * kBlockM;
    if (block_query >= sequence.seqlen_q || job.tile < 0) return;
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
    const Matrix<Element> target(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query,
                                 sequence.seqlen_q, problem.head_dim);
    const Sums sums;
    typename Sums::Tile dq[Sums::kTilesM];
    const long long tile = Options::template query_tile<kBlockM>(problem, sequence, job.head, job.tile);
    sums.load(dq, arrays.dq_sums + tile * (kBlockM * kHeadDim));

    const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
    const int lane_row = block_query + sums.row + threadIdx.x % 32 / 4;
    bool finite = true;
#pragma unroll
    for (int m = 0; m < Sums::kTilesM; ++m) {
      finite = store_rows(target, dq[m], scale, lane_row + 16 * m, sums.col) && finite;
    }
    // 0 * NaN is NaN: each key meets all queries, if only with weight 0, and may have spoiled those that do not see it.
    const bool hides_pairs =
        Options::kHidesPairs || !band.all_visible({block_query, block_query + kBlockM}, {0, sequence.seqlen_k});
    if (hides_pairs && __syncthreads_or(!finite)) {
      const int warp = threadIdx.x / 32;
      auto* const memories = reinterpret_cast<typename Careful::Memory*>(dynamic_shared_memory());
      Careful::template write_queries<kHeadDim>(arrays, params, options, job,
                                                {block_query + warp, block_query + kBlockM}, kNumWarps, memories[warp]);
    }
  }
};

}  // namespace cuflash
