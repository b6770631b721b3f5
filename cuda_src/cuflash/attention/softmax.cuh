// Softmax weights, and the online softmax of one row (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1).
#pragma once

#include <cuflash/common/math.cuh>

namespace cuflash {

// e^(score * unit - shift). The difference comes first: it is small, and exact where the score is the shift.
__device__ __forceinline__ float softmax_weight(float score, float shift, float unit = 1.0f) {
  return exp2f((score * unit - shift) * kLog2e);
}

// After some tiles, the exponentials of the row's scores add up to sum * e^base; with kLog2 scores and bases are powers
// of two. Then one multiply-add leads from a product to what is to be exponentiated, and is exact but for its own
// rounding, since a base takes part as it is.
template <bool kLog2 = false>
struct OnlineSoftmax {
  static constexpr float kUnit = kLog2 ? kLog2e : 1.0f, kNatural = kLog2 ? kLn2 : 1.0f;  // to scores, and back

  // A base that is too small by up to this costs no accuracy, and earlier results are seldom rescaled.
  static constexpr float kSlack = 5.5f * kUnit;

  float base = -infinity();

  // Whether a score is so large, or the first one, that the base must follow it.
  __device__ __forceinline__ bool exceeded_by(float score) const { return score > base + kSlack; }

  // Takes note of the largest score of a new tile; returns the factor by which earlier sums must be scaled.
  __device__ __forceinline__ float rescale(float tile_max) {
    if (!exceeded_by(tile_max)) return 1.0f;
    const float factor = power(base - tile_max);
    base = tile_max;
    return factor;
  }

  // What to subtract from scores: finite as long as no score was seen, so that hidden scores get weight 0, not NaN.
  __device__ __forceinline__ float shift() const { return base == -infinity() ? 0.0f : base; }
  __device__ __forceinline__ float natural_shift() const { return shift() * kNatural; }

  // Lets one more logit into the sum, a natural one, which gives no value; returns the factor for what was summed up
  // before.
  __device__ __forceinline__ float join(float logit, float& sum) {
    const float score = logit * kUnit, factor = rescale(score);
    sum = sum * factor + power(score - shift());
    return factor;
  }

  // The natural log of the sum of exponentials.
  __device__ __forceinline__ float lse(float sum) const {
    if (sum == 0.0f) return -infinity();
    return fmaf(base, kNatural, kLn2 * log2f(sum));
  }

 private:
  static __device__ __forceinline__ float power(float x) { return exp2f(kLog2 ? x : x * kLog2e); }
};

}  // namespace cuflash
