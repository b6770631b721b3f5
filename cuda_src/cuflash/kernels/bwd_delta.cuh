// Preprocessing of the backward: delta = rowsum(dout * out) - dlse (FlashAttention-2, algorithm 2, line 4), lse as
// weights take it, and zeros where other kernels add up.
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/attention/recompute.cuh>
#include <cuflash/common/math.cuh>

namespace cuflash {

// A block takes kNumRows rows of a head; a row takes as many lanes as it has pieces of 16 bytes, a power of two of
// them. A lane has pieces of kRowsAtOnce rows on their way at the same time: memory decides how long all takes.
template <class Number, int kNumRows, int kNumWarps>
struct BwdDelta {
  using Element = typename Number::Element;
  using Rows = Matrix<const Element>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = 0;
  static constexpr int kVector = Rows::kVector;
  static constexpr int kRowsAtOnce = 4;

  struct Arrays {
    const Element *out, *dout;
    const float *lse, *dlse;  // dlse may be null
    float4* cleared;          // all from here to delta becomes 0
    float *delta, *lse_log2;  // lse_log2, in powers of two and as lse_of_value has it, may be null
  };

  // Rows know no sequences here: packed arrays count as one. The same rows of all heads follow each other: they may be
  // neighbours in memory.
  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params) {
    const Problem& problem = params.problem;
    clear(arrays.cleared, reinterpret_cast<float4*>(arrays.delta));
    const int num_m_blocks = ceil_div(problem.seqlen_q, kNumRows);
    if (num_m_blocks * problem.batch == 0) return;
    const int head = blockIdx.x % problem.num_heads;
    const int first_row = blockIdx.x / problem.num_heads % num_m_blocks * kNumRows;
    const int batch = blockIdx.x / problem.num_heads / num_m_blocks;
    const Rows out(arrays.out, params.out, batch, head, first_row, 1, problem.head_dim_v);
    const Rows dout(arrays.dout, params.dout, batch, head, first_row, 1, problem.head_dim_v);
    const Matrix<const float> dlse(arrays.dlse, params.dlse, batch, head, first_row);
    const Matrix<float> delta(arrays.delta, params.delta, batch, head, first_row);
    const Matrix<const float> lse(arrays.lse, params.lse, batch, head, first_row);
    const Matrix<float> lse_log2(arrays.lse_log2, params.delta, batch, head, first_row);
    int lanes = 1;
    while (lanes < 32 && lanes * kVector < out.cols) lanes *= 2;
    const int lane = threadIdx.x % lanes, step = kNumThreads / lanes,
              end = smaller(kNumRows, problem.seqlen_q - first_row);
    for (int first = 0; first < end; first += kRowsAtOnce * step) {
      const auto row = [&](int i) { return first + i * step + static_cast<int>(threadIdx.x) / lanes; };
      int rows[kRowsAtOnce];  // those behind the end are the last one once more
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) rows[i] = smaller(row(i), end - 1);
      float sums[kRowsAtOnce] = {};
      for (int col = lane * kVector; col < out.cols; col += lanes * kVector) {
        if (out.vectorized && dout.vectorized) {
          add_products(sums, out, dout, rows, col);
          continue;
        }
        const int end_col = smaller(col + kVector, out.cols);  // the same columns, so that sums are the same bits
#pragma unroll 1
        for (int j = col; j < end_col; ++j) {
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i)
            sums[i] += to_float(*out.at(rows[i], j)) * to_float(*dout.at(rows[i], j));
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
          sums[i] += __shfl_xor_sync(kFullMask, sums[i], distance);
        }
        if (lane != 0 || row(i) >= end) continue;
        *delta.at(row(i), 0) = arrays.dlse == nullptr ? sums[i] : sums[i] - *dlse.at(row(i), 0);
        if (arrays.lse_log2 == nullptr) continue;
        *lse_log2.at(row(i), 0) = RowStatistics::lse_of_value(*lse.at(row(i), 0) * kLog2e);
      }
    }
  }

 private:
  // Each thread a piece of 16 bytes, then one as many pieces further as there are threads.
  static __device__ __forceinline__ void clear(float4* begin, const float4* end) {
    const long long step = static_cast<long long>(gridDim.x) * kNumThreads;
#pragma unroll 4
    for (float4* piece = begin + blockIdx.x * kNumThreads + threadIdx.x; piece < end; piece += step) {
      *piece = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  // Adds what 16 bytes of each row contribute.
  static __device__ __forceinline__ void add_products(float (&sums)[kRowsAtOnce], const Rows& out, const Rows& dout,
                                                      const int (&rows)[kRowsAtOnce], int col) {
    struct alignas(16) Piece {
      Element x[kVector];
    } x[kRowsAtOnce], y[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      *reinterpret_cast<uint4*>(x + i) = *reinterpret_cast<const uint4*>(out.at(rows[i], col));
      *reinterpret_cast<uint4*>(y + i) = *reinterpret_cast<const uint4*>(dout.at(rows[i], col));
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[i] += to_float(x[i].x[j]) * to_float(y[i].x[j]);
    }
  }
};

}  // namespace cuflash
