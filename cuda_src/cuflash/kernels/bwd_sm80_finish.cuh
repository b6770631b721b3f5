// The end of the backward on mma.sync: the gradient of Q, out of the sums of bwd_sm80_dkdv.cuh.
#pragma once

#include <cuflash/attention/careful_gradient.cuh>
#include <cuflash/attention/gradient_sums.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/row_store.cuh>
#include <cuflash/tile/shared_sums.cuh>

namespace cuflash {

// A block has a tile of sums, and the same warps that added to it.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kNumWarps>
struct BwdSm80Finish {
  using Element = typename Number::Element;
  using Sums = SharedSums<kBlockM, kHeadDim, kNumWarps>;
  using Careful = CarefulGradient<Element, Options>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = kNumWarps * sizeof(typename Careful::Memory);

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element* dq;
    const float* dq_sums;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, Options options) {
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
    const int tile = first_tile_of_sums<kBlockM, Options>(problem, sequence) + job.tile;
    const long long place = static_cast<long long>(tile) * problem.num_heads + job.head;
    sums.load(dq, arrays.dq_sums + place * (kBlockM * kHeadDim));

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
      options.enter(sequence, job.head);
      auto* const memory = reinterpret_cast<typename Careful::Memory*>(dynamic_shared_memory()) + threadIdx.x / 32;
      write_queries(arrays, params, options, job, block_query + static_cast<int>(threadIdx.x / 32), target, *memory);
    }
  }

  // Cold. Computes every kNumWarps-th row of the block once more.
  static __device__ __forceinline__ void write_queries(const Arrays& arrays, const BwdParams& params,
                                                       const Options& options, const Job& job, int first_row,
                                                       const Matrix<Element>& target,
                                                       typename Careful::Memory& memory) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
    const int batch = sequence.batch, head_kv = job.head / problem.group_size();
    const Matrix<const Element> q(arrays.q, params.q, batch, job.head, sequence.first_query, sequence.seqlen_q,
                                  problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim_v);
    const Matrix<const Element> dout(arrays.dout, params.dout, batch, job.head, sequence.first_query, sequence.seqlen_q,
                                     problem.head_dim_v);
    const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, job.head);
    const Careful careful = {q, k, v, dout, options, band, problem.softmax_scale, rows, memory};
    const int end = min((job.tile + 1) * kBlockM, sequence.seqlen_q);
#pragma unroll 1
    for (int row = first_row; row < end; row += kNumWarps) {
      typename Careful::template Row<kHeadDim> sum;
      careful.add_query(sum, row);
      sum.write(target, row, problem.softmax_scale);
    }
  }
};

}  // namespace cuflash
