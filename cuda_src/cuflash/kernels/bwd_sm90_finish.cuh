// The last step of the Hopper backward: dQ from sums in the order of registers to rows, and what NaN has spoiled.
#pragma once

#include <cuflash/attention/careful_gradients.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block writes the rows of a tile of queries of one head, with a warpgroup for each part of the sums. Blocks behind
// those look after the tiles of keys.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN>
struct BwdSm90Finish {
  using Element = typename Number::Element;
  using Sums = QueryGradient<kHeadDim, kBlockM>;
  using Careful = CarefulGradients<Element, Options>;
  using Input = Matrix<const Element>;

  static constexpr int kNumThreads = 256, kNumWarps = kNumThreads / 32;
  static constexpr int kSharedBytes = sizeof(typename Careful::Memory) * kNumWarps;

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    float* dq_sums;
    const unsigned* spoiled;  // of each tile of keys, whether its gradients must be computed once more
    Element *dq, *dk, *dv;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, const Options& options) {
    const Problem& problem = params.problem;
    const int num_query_jobs = Options::template num_query_jobs<kBlockM>(problem);
    if (blockIdx.x < num_query_jobs) {
      const Job job = options.template query_job<kBlockM>(problem, blockIdx.x);
      if (job.tile < 0 || job.tile * kBlockM >= job.sequence.seqlen_q) return;
      // 0 * NaN is NaN: where pairs are hidden, keys that others see may have spoiled all queries.
      if (__syncthreads_or(!write_queries(arrays, params, job))) mend_queries(arrays, params, options, job);
    } else {
      const Job job = options.template key_job<kBlockN>(problem, blockIdx.x - num_query_jobs);
      if (job.tile < 0 || job.tile * kBlockN >= job.sequence.num_keys) return;
      const long long tile = Options::template key_tile<kBlockN>(problem, job.sequence, job.head, job.tile);
      if (arrays.spoiled[tile]) mend_keys(arrays, params, options, job);
    }
  }

 private:
  // Returns whether all is finite.
  static __device__ __forceinline__ bool write_queries(const Arrays& arrays, const BwdParams& params, const Job& job) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const Matrix<Element> dq(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
                             problem.head_dim);
    const int part = threadIdx.x / 128, thread = threadIdx.x % 128;
    const long long tile = Options::template query_tile<kBlockM>(problem, sequence, job.head, job.tile);
    const float4* const pieces = Sums::pieces(arrays.dq_sums, tile, part, thread);
    typename Sums::Part sums;
#pragma unroll
    for (int i = 0; i < Sums::kPieces; ++i) {
      const float4 piece = pieces[i * 128];
      sums.x[4 * i] = piece.x;
      sums.x[4 * i + 1] = piece.y;
      sums.x[4 * i + 2] = piece.z;
      sums.x[4 * i + 3] = piece.w;
    }
    const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
    const int first_row = job.tile * kBlockM + Sums::first_query(part) + thread / 32 * 16 + thread % 32 / 4;
    return store_rows_16(dq, sums, scale, first_row, Sums::first_col(part));
  }

  // What a warp needs to compute rows of a pair of heads once more.
  struct Head {
    Input q, k, v, dout;
    RowStatistics rows;
    Options options;
    Band band;
    float scale;

    __device__ __forceinline__ Head(const Arrays& arrays, const BwdParams& params, const Options& of_call,
                                    const Sequence& sequence, int head, int head_kv)
        : q(arrays.q, params.q, sequence.batch, head, sequence.first_query, sequence.seqlen_q, params.problem.head_dim),
          k(arrays.k, params.k, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
            params.problem.head_dim),
          v(arrays.v, params.v, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
            params.problem.head_dim_v),
          dout(arrays.dout, params.dout, sequence.batch, head, sequence.first_query, sequence.seqlen_q,
               params.problem.head_dim_v),
          rows(arrays.lse, arrays.delta, params, sequence, head),
          options(of_call),
          band(params.problem.band(sequence.seqlen_q, sequence.seqlen_k)),
          scale(params.problem.softmax_scale) {
      options.enter(sequence, head);
    }

    __device__ __forceinline__ Careful careful() const {
      auto* const memories = reinterpret_cast<typename Careful::Memory*>(dynamic_shared_memory());
      return {q, k, v, dout, rows, options, band, scale, memories[threadIdx.x / 32]};
    }
  };

  // Cold.
  static __device__ __forceinline__ void mend_queries(const Arrays& arrays, const BwdParams& params,
                                                      const Options& options, const Job& job) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const Head head(arrays, params, options, sequence, job.head, job.head / problem.group_size());
    const Matrix<Element> dq(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
                             problem.head_dim);
    const int begin = job.tile * kBlockM, end = smaller(begin + kBlockM, sequence.seqlen_q);
#pragma unroll 1
    for (int row = begin + threadIdx.x / 32; row < end; row += kNumWarps) {
      float sum[kHeadDim / 32] = {};
      head.careful().add_row(row, sum);
      store_row(dq, row, sum, problem.softmax_scale);
    }
  }

  // Cold.
  static __device__ __forceinline__ void mend_keys(const Arrays& arrays, const BwdParams& params,
                                                   const Options& options, const Job& job) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const int group = problem.group_size();
    const Matrix<Element> dk(arrays.dk, params.dk, sequence.batch, job.head, sequence.first_key, sequence.num_keys,
                             problem.head_dim);
    const Matrix<Element> dv(arrays.dv, params.dv, sequence.batch, job.head, sequence.first_key, sequence.num_keys,
                             problem.head_dim_v);
    const int begin = job.tile * kBlockN, end = smaller(begin + kBlockN, sequence.num_keys);
#pragma unroll 1
    for (int key = begin + threadIdx.x / 32; key < end; key += kNumWarps) {
      float dk_row[kHeadDim / 32] = {}, dv_row[kHeadDimV / 32] = {};
#pragma unroll 1
      for (int i = 0; i < group; ++i) {
        const Head head(arrays, params, options, sequence, job.head * group + i, job.head);
        head.careful().add_column(key, dk_row, dv_row);
      }
      store_row(dk, key, dk_row, problem.softmax_scale);
      store_row(dv, key, dv_row, 1.0f);
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void store_row(const Matrix<Element>& out, int row, const float (&sum)[kCount],
                                                   float scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int col = 32 * i + threadIdx.x % 32;
      if (col < out.cols) *out.at(row, col) = from_float<Element>(sum[i] * scale);
    }
  }
};

}  // namespace cuflash
