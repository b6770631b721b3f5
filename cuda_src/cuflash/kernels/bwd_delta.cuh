// Preprocessing of the backward: delta = rowsum(dout * out) - dlse (FlashAttention-2, algorithm 2, line 4).
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/common/math.cuh>

namespace cuflash {

// A block takes kNumRows rows of a head; a row takes as many lanes as it has pieces of 16 bytes, a power of two of
// them.
template <class Number, int kNumRows, int kNumWarps>
struct BwdDelta {
  using Element = typename Number::Element;
  using Rows = Matrix<const Element>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = 0;
  static constexpr int kVector = Rows::kVector;

  struct Arrays {
    const Element *out, *dout;
    const float* dlse;  // may be null
    float* delta;
  };

  // Rows know no sequences here: packed arrays count as one.
  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params) {
    const Problem& problem = params.problem;
    const int num_m_blocks = ceil_div(problem.seqlen_q, kNumRows), first_row = blockIdx.x % num_m_blocks * kNumRows;
    const int head = blockIdx.x / num_m_blocks % problem.num_heads;
    const int batch = blockIdx.x / num_m_blocks / problem.num_heads;
    const Rows out(arrays.out, params.out, batch, head, first_row, 1, problem.head_dim_v);
    const Rows dout(arrays.dout, params.dout, batch, head, first_row, 1, problem.head_dim_v);
    const Matrix<const float> dlse(arrays.dlse, params.dlse, batch, head, first_row);
    const Matrix<float> delta(arrays.delta, params.delta, batch, head, first_row);
    int lanes = 1;
    while (lanes < 32 && lanes * kVector < out.cols) lanes *= 2;
    const int lane = threadIdx.x % lanes, end = smaller(kNumRows, problem.seqlen_q - first_row);
    for (int first = 0; first < end; first += kNumThreads / lanes) {
      const int row = first + threadIdx.x / lanes;
      float sum = 0.0f;
      if (row < end) {
        for (int col = lane * kVector; col < out.cols; col += lanes * kVector) sum += product(out, dout, row, col);
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullMask, sum, distance);
      if (lane == 0 && row < end) *delta.at(row, 0) = arrays.dlse == nullptr ? sum : sum - *dlse.at(row, 0);
    }
  }

 private:
  // Of 16 bytes of a row of both.
  static __device__ __forceinline__ float product(const Rows& out, const Rows& dout, int row, int col) {
    alignas(16) Element x[kVector], y[kVector];
    if (out.vectorized && dout.vectorized) {
      *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(out.at(row, col));
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(dout.at(row, col));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool inside = col + i < out.cols;
        x[i] = inside ? *out.at(row, col + i) : from_float<Element>(0.0f);
        y[i] = inside ? *dout.at(row, col + i) : from_float<Element>(0.0f);
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += to_float(x[i]) * to_float(y[i]);
    return sum;
  }
};

}  // namespace cuflash
