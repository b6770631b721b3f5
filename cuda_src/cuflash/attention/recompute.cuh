// The backward of one pair of query and key: its weight, recomputed without another softmax, and its gradients.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/softmax.cuh>

namespace cuflash {

// lse and delta = rowsum(dout * out) - dlse of the queries of one head.
struct RowStatistics {
  const float *lse, *delta;
  long long lse_stride;
  int seqlen_q;

  template <class Params>
  __device__ __forceinline__ RowStatistics(const float* lse_array, const float* delta_array, const Params& params,
                                           const Sequence& sequence, int head)
      : lse(Matrix<const float>(lse_array, params.lse, sequence.batch, head, sequence.first_query).data),
        delta(Matrix<const float>(delta_array, params.delta, sequence.batch, head, sequence.first_query).data),
        lse_stride(params.lse.row),
        seqlen_q(sequence.seqlen_q) {}

  // Rows that see no key, or lie beyond the end, get +infinity: their weights become 0 without a mask.
  __device__ __forceinline__ float lse_of(int row) const {
    if (row >= seqlen_q) return infinity();
    return lse_of_value(lse[row * lse_stride]);
  }
  static __device__ __forceinline__ float lse_of_value(float value) {
    return value == -infinity() ? infinity() : value;
  }

  // Starts to copy both, as they are, to shared memory; 0 for rows beyond the end.
  __device__ __forceinline__ void start_to_copy(int row, float* to_lse, float* to_delta) const {
    ptx::cp_async_4(to_lse, lse + row * lse_stride, row < seqlen_q);
    ptx::cp_async_4(to_delta, delta + row, row < seqlen_q);
  }

  __device__ __forceinline__ float delta_of(int row) const { return row < seqlen_q ? delta[row] : 0.0f; }
};

// What a pair adds to the gradients: `weight` times dout to that of the value, `dscore` times the key or the query to
// that of the other.
struct PairGradient {
  float weight, dscore;
};

// dweight = dout . value; `survives` counts only where there is dropout. kExact: scores of float32 are rounded before
// the lse is subtracted, as in the forward pass.
template <bool kExact, class Pairs, class Key>
__device__ __forceinline__ PairGradient pair_gradient(const Pairs& pairs, float product, float dweight, float lse,
                                                      float delta, int query, Key key, bool survives) {
  const Dual score = pairs.score(product, query, key);
  const float weight = kExact ? exp2f(__fsub_rn(score.value, lse) * kLog2e) : softmax_weight(score.value, lse);
  if constexpr (Pairs::kHasDropout) {
    const float factor = survives ? pairs.options.survivor_factor() : 0.0f;
    return {weight * factor, weight * (factor * dweight - delta) * score.slope};
  } else {
    return {weight, weight * (dweight - delta) * score.slope};
  }
}

}  // namespace cuflash
