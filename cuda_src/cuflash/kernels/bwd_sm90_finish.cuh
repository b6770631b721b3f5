// The last step of the Hopper backward: dQ from sums in the order of registers to rows, where it comes so, and what NaN
// has spoiled.
#pragma once

#include <cuflash/attention/careful_gradients.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block writes the rows of a tile of queries of one head: each of its warpgroups has a part of the sums. Each warp of
// the blocks behind those looks after a tile of keys. Without kHasSums dQ is there already.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, bool kHasSums>
struct BwdSm90Finish {
  using Element = typename Number::Element;
  using Sums = QueryGradient<kHeadDim, kBlockM>;
  using Careful = CarefulGradients<Element, Options>;

  static constexpr int kNumThreads = 256, kNumWarps = kNumThreads / 32;
  static constexpr int kSharedBytes = sizeof(typename Careful::Memory) * kNumWarps;

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    float* dq_sums;
    const unsigned *spoiled_queries, *spoiled_keys;  // of each tile, whether its gradients must be computed once more
    Element *dq, *dk, *dv;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, const Options& options) {
    const Problem& problem = params.problem;
    const int num_query_jobs = Options::template num_query_jobs<kBlockM>(problem);
    if (blockIdx.x < num_query_jobs) {
      const Job job = options.template query_job<kBlockM>(problem, blockIdx.x);
      if (job.tile < 0 || job.tile * kBlockM >= job.sequence.seqlen_q) return;
      const long long tile = Options::template query_tile<kBlockM>(problem, job.sequence, job.head, job.tile);
      bool spoiled;
      if constexpr (kHasSums) {
        // 0 * NaN is NaN: where pairs are hidden, keys that others see may have spoiled all queries.
        spoiled = __syncthreads_or(!write_queries(arrays, params, job, tile));
      } else {
        spoiled = arrays.spoiled_queries[tile];
      }
      const Band band = problem.band(job.sequence.seqlen_q, job.sequence.seqlen_k);
      const Range tile_of_queries = {job.tile * kBlockM, (job.tile + 1) * kBlockM};
      const bool hides_pairs = Options::kHidesPairs || band.hides_any(tile_of_queries, {0, job.sequence.seqlen_k});
      if (spoiled && hides_pairs) {
        const Range queries = {tile_of_queries.begin + static_cast<int>(threadIdx.x / 32), tile_of_queries.end};
        Careful::template write_queries<kHeadDim>(arrays, params, options, job, queries, kNumWarps, memory());
      }
      return;
    }
    const int index = (blockIdx.x - num_query_jobs) * kNumWarps + uniform(threadIdx.x / 32);
    if (index >= Options::template num_key_jobs<kBlockN>(problem)) return;
    const Job job = options.template key_job<kBlockN>(problem, index);
    if (job.tile < 0 || job.tile * kBlockN >= job.sequence.num_keys) return;
    if (arrays.spoiled_keys[Options::template key_tile<kBlockN>(problem, job.sequence, job.head, job.tile)]) {
      const Range keys = {job.tile * kBlockN, (job.tile + 1) * kBlockN};
      Careful::template write_keys<kHeadDim, kHeadDimV>(arrays, params, options, job, keys, 1, memory());
    }
  }

 private:
  // Returns whether all is finite.
  static __device__ __forceinline__ bool write_queries(const Arrays& arrays, const BwdParams& params, const Job& job,
                                                       long long tile) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const Matrix<Element> dq(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
                             problem.head_dim);
    const int thread = threadIdx.x % 128;
    const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
    static_assert(kNumThreads / 128 == Sums::kParts);
    const int part = threadIdx.x / 128;
    const float4* const pieces = Sums::pieces(arrays.dq_sums, tile, part, thread);
    typename Sums::Part sums;
#pragma unroll
    for (int i = 0; i < Sums::kPieces; ++i) {
      const float4 piece = pieces[i * 32];
      sums.x[4 * i] = piece.x;
      sums.x[4 * i + 1] = piece.y;
      sums.x[4 * i + 2] = piece.z;
      sums.x[4 * i + 3] = piece.w;
    }
    const int first_row = job.tile * kBlockM + Sums::first_query(part) + thread / 32 * 16 + thread % 32 / 4;
    return store_vectorized_rows<16, true>(dq, sums, scale, first_row, Sums::first_col(part));
  }

  // Of this warp.
  static __device__ __forceinline__ typename Careful::Memory& memory() {
    return reinterpret_cast<typename Careful::Memory*>(dynamic_shared_memory())[threadIdx.x / 32];
  }
};

}  // namespace cuflash
