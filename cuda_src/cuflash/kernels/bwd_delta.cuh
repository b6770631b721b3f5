// Preprocessing of the backward: delta = rowsum(dout * out) - dlse (FlashAttention-2, algorithm 2, line 4).
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/common/math.cuh>

namespace cuflash {

// One warp per row.
template <class Number, int kNumWarps>
struct BwdDelta {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = 0;

  struct Arrays {
    const Element *out, *dout;
    const float* dlse;  // may be null
    float* delta;
  };

  // Rows know no sequences here: packed arrays count as one.
  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params) {
    const Problem& problem = params.problem;
    const int num_m_blocks = ceil_div(problem.seqlen_q, kNumWarps);
    const int row = blockIdx.x % num_m_blocks * kNumWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x / num_m_blocks % problem.num_heads;
    const int batch = blockIdx.x / num_m_blocks / problem.num_heads;
    if (row >= problem.seqlen_q) return;

    const Matrix<const Element> out(arrays.out, params.out, batch, head, row);
    const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, row);
    float delta = 0.0f;
    for (int d = lane; d < problem.head_dim_v; d += 32) delta += to_float(*dout.at(0, d)) * to_float(*out.at(0, d));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) delta += __shfl_xor_sync(kFullMask, delta, distance);
    if (lane == 0) {
      if (arrays.dlse != nullptr) delta -= *Matrix<const float>(arrays.dlse, params.dlse, batch, head, row).data;
      *Matrix<float>(arrays.delta, params.delta, batch, head, row).data = delta;
    }
  }
};

}  // namespace cuflash
