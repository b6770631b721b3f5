// What the backward knows of each query row: enough to recompute its weights without another softmax.
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/common/math.cuh>

namespace cuflash {

// lse and delta = rowsum(dout * out) of the queries of one head.
struct RowStatistics {
  const float *lse, *delta;
  long long lse_stride;
  int seqlen_q;

  __device__ __forceinline__ RowStatistics(const float* lse_array, const float* delta_array, const BwdParams& params,
                                           int batch, int head)
      : lse(lse_array + batch * params.lse.batch + head * params.lse.head),
        delta(delta_array +
              (static_cast<long long>(batch) * params.problem.num_heads + head) * params.problem.seqlen_q),
        lse_stride(params.lse.row),
        seqlen_q(params.problem.seqlen_q) {}

  // Rows that see no key, or lie beyond the end, get +infinity: their weights become 0 without a mask.
  __device__ __forceinline__ float lse_of(int row) const {
    if (row >= seqlen_q) return infinity();
    const float value = lse[row * lse_stride];
    return value == -infinity() ? infinity() : value;
  }

  __device__ __forceinline__ float delta_of(int row) const { return row < seqlen_q ? delta[row] : 0.0f; }
};

// The gradient of a score from that of its weight.
__device__ __forceinline__ float score_gradient(float weight, float dweight, float delta) {
  return weight * (dweight - delta);
}

}  // namespace cuflash
