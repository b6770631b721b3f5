// Rows of the gradients once more, from global memory, in which hidden pairs take no part even if what they meet is NaN
// or infinity (attention/careful_row.cuh says why). Slow: for the rare row that meets such a value.
#pragma once

#include <cuflash/attention/recompute.cuh>
#include <cuflash/attention/survivors.cuh>

namespace cuflash {

// What a warp needs to know of one query head.
template <class Element, class Options>
struct CarefulGradients {
  // What a warp needs for the pairs of a 16 x 16 tile: it goes through rows and columns in such steps.
  struct alignas(16) Memory {
    unsigned char pairs[larger(Options::template kTileBytes<16, 16>, 16)];
  };

  Matrix<const Element> q, k, v, dout;
  RowStatistics rows;
  Options options;
  Band band;
  float scale;
  Memory& memory;  // of this warp

  template <class Arrays>
  __device__ __forceinline__ CarefulGradients(const Arrays& arrays, const BwdParams& params, const Options& of_call,
                                              const Sequence& sequence, int head, int head_kv, Memory& memory)
      : q(arrays.q, params.q, sequence.batch, head, sequence.first_query, sequence.seqlen_q, params.problem.head_dim),
        k(arrays.k, params.k, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k, params.problem.head_dim),
        v(arrays.v, params.v, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
          params.problem.head_dim_v),
        dout(arrays.dout, params.dout, sequence.batch, head, sequence.first_query, sequence.seqlen_q,
             params.problem.head_dim_v),
        rows(arrays.lse, arrays.delta, params, sequence, head),
        options(of_call),
        band(params.problem.band(sequence.seqlen_q, sequence.seqlen_k)),
        scale(params.problem.softmax_scale),
        memory(memory) {
    options.enter(sequence, head);
  }

  // Writes every `step`-th of these rows of dQ; called by a whole warp.
  template <int kHeadDim, class Arrays>
  static __device__ __forceinline__ void write_queries(const Arrays& arrays, const BwdParams& params,
                                                       const Options& options, const Job& job, Range queries, int step,
                                                       Memory& memory) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const CarefulGradients head(arrays, params, options, sequence, job.head, job.head / problem.group_size(), memory);
    const Matrix<Element> dq(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
                             problem.head_dim);
    const int end = smaller(queries.end, sequence.seqlen_q);
#pragma unroll 1
    for (int row = queries.begin; row < end; row += step) {
      float sum[kHeadDim / 32] = {};
      head.add_row(row, sum);
      store_row(dq, row, sum, problem.softmax_scale);
    }
  }

  // Likewise of dK and dV.
  template <int kHeadDim, int kHeadDimV, class Arrays>
  static __device__ __forceinline__ void write_keys(const Arrays& arrays, const BwdParams& params,
                                                    const Options& options, const Job& job, Range keys, int step,
                                                    Memory& memory) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const int group = problem.group_size(), end = smaller(keys.end, sequence.num_keys);
    const Matrix<Element> dk(arrays.dk, params.dk, sequence.batch, job.head, sequence.first_key, sequence.num_keys,
                             problem.head_dim);
    const Matrix<Element> dv(arrays.dv, params.dv, sequence.batch, job.head, sequence.first_key, sequence.num_keys,
                             problem.head_dim_v);
#pragma unroll 1
    for (int key = keys.begin; key < end; key += step) {
      float dk_row[kHeadDim / 32] = {}, dv_row[kHeadDimV / 32] = {};
#pragma unroll 1
      for (int i = 0; i < group; ++i) {
        const CarefulGradients head(arrays, params, options, sequence, job.head * group + i, job.head, memory);
        head.add_column(key, dk_row, dv_row);
      }
      store_row(dk, key, dk_row, problem.softmax_scale);
      store_row(dv, key, dv_row, 1.0f);
    }
  }

 private:
  // Adds to a row of dQ.
  template <int kCount>
  __device__ __forceinline__ void add_row(int query, float (&dq)[kCount]) const {
    const Range keys = band.keys_of({query, query + 1});
#pragma unroll 1
    for (int first_key = keys.begin / 16 * 16; first_key < keys.end; first_key += 16) {
      const Found found = pair(query, first_key + threadIdx.x % 16);
      add(dq, found.visible, found.pair.dscore, k, first_key);
    }
  }

  // Adds to a row of dK and of dV.
  template <int kCount, int kCountV>
  __device__ __forceinline__ void add_column(int key, float (&dk)[kCount], float (&dv)[kCountV]) const {
    const Range queries = band.queries_of({key, key + 1});
#pragma unroll 1
    for (int first_query = queries.begin / 16 * 16; first_query < queries.end; first_query += 16) {
      const Found found = pair(first_query + threadIdx.x % 16, key);
      add(dk, found.visible, found.pair.dscore, q, first_query);
      add(dv, found.visible, found.pair.weight, dout, first_query);
    }
  }

  struct Found {
    bool visible;
    PairGradient pair;
  };

  // The pair of this lane and of the one 16 further.
  __device__ __forceinline__ Found pair(int query, int key) const {
    const int tile_query = query / 16 * 16, tile_key = key / 16 * 16;
    Options here = options;
    __syncwarp();
    here.template load<16, 16, 32>(memory.pairs, tile_query, tile_key, threadIdx.x % 32);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    here.template look_at<16, 16>(memory.pairs, tile_query, tile_key);
    const Pairs<Options> pairs = {here, band, scale};
    const bool kept = survives(here, query, key);
    const bool visible = query < band.seqlen_q && pairs.visible(query, key);
    if (!visible) return {false, {0.0f, 0.0f}};
    float product = 0.0f, dweight = 0.0f;
#pragma unroll 1
    for (int col = 0; col < q.cols; ++col) product += to_float(*q.at(query, col)) * to_float(*k.at(key, col));
#pragma unroll 1
    for (int col = 0; col < v.cols; ++col) dweight += to_float(*dout.at(query, col)) * to_float(*v.at(key, col));
    const PairGradient exact = pair_gradient<sizeof(Element) == 4>(pairs, product, dweight, rows.lse_of(query),
                                                                   rows.delta_of(query), query, key, kept);
    return {true, {rounded(exact.weight), rounded(exact.dscore)}};
  }

  // As for the tensor cores.
  static __device__ __forceinline__ float rounded(float x) { return to_float(from_float<Element>(x)); }

  // Adds the rows of a matrix from this one, times the factors that the lanes have.
  template <int kCount>
  static __device__ __forceinline__ void add(float (&sum)[kCount], bool visible, float factor,
                                             const Matrix<const Element>& rows, int first_row) {
    const unsigned all_visible = __ballot_sync(kFullMask, visible);
#pragma unroll 1
    for (int other = 0; other < 16; ++other) {
      const float of_other = __shfl_sync(kFullMask, factor, other);
      if (!(all_visible >> other & 1)) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int col = 32 * i + threadIdx.x % 32;
        if (col < rows.cols) sum[i] += of_other * to_float(*rows.at(first_row + other, col));
      }
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
