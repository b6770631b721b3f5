// Softmax weights, and the online softmax of one row (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1).
#pragma once

#include <cuflash/common/math.cuh>

namespace cuflash {

// e^(score * unit - shift). The difference comes first: it is small, and exact where the score is the shift.
__device__ __forceinline__ float softmax_weight(float score, float shift, float unit = 1.0f) {
  return exp2f((score * unit - shift) * kLog2e);
}

// How exponentials of what a score is above a base are taken.
enum class Exponential {
  kNatural,  // e^(score - base), exact where a score is the base
  kLog2,     // 2^(score - base): both were multiplied by log2(e) before, so that one multiply-add leads from a product
             // here, exact but for its own rounding
  kFused,    // e^(score - base) by one multiply-add; up to a factor of the row, the rounding of log2(e) times its base
};

// After some tiles, the exponentials of the row's scores add up to sum * e^base, or 2^base.
template <Exponential kExponential = Exponential::kNatural>
struct OnlineSoftmax {
  static constexpr bool kLog2 = kExponential == Exponential::kLog2;
  static constexpr float kUnit = kLog2 ? kLog2e : 1.0f;  // of scores

  // A base that is too small by up to this costs no accuracy, and earlier results are seldom rescaled.
  static constexpr float kSlack = 5.5f * kUnit;

  float base = -infinity();

  // Whether a score is so large, or the first one, that the base must follow it.
  __device__ __forceinline__ bool exceeded_by(float score) const { return score > base + kSlack; }

  // Takes note of the largest score of a new tile; returns the factor by which earlier sums must be scaled.
  __device__ __forceinline__ float rescale(float tile_max) {
    if (!exceeded_by(tile_max)) return 1.0f;
    const float factor = exponential(base, tile_max);
    base = tile_max;
    return factor;
  }

  // What to subtract from scores: finite as long as no score was seen, so that hidden scores get weight 0, not NaN.
  __device__ __forceinline__ float shift() const { return base == -infinity() ? 0.0f : base; }

  __device__ __forceinline__ float weight(float score) const {
    if constexpr (kExponential == Exponential::kFused) {
      return exp2f(fmaf(score, unit_of(base), -__fmul_rn(shift(), unit_of(base))));
    } else {
      return exponential(score, shift());
    }
  }

  // Lets one more logit into the sum, a natural one, which gives no value; returns the factor for what was summed up
  // before.
  __device__ __forceinline__ float join(float logit, float& sum) {
    const float score = logit * kUnit, factor = rescale(score);
    sum = sum * factor + weight(score);
    return factor;
  }

  // The sum of exponentials as sum * e^base, where base is natural, and sum makes up for what it is rounded by.
  struct Natural {
    float base, sum;
  };
  __device__ __forceinline__ Natural natural(float sum) const {
    if (kExponential == Exponential::kNatural || sum == 0.0f) return {base, sum};
    const float natural = kLog2 ? __fmul_rn(base, kLn2) : base, unit = kLog2 ? kLog2e : unit_of(base);
    return {natural, sum * exp2f(fmaf(-natural, unit, kLog2 ? base : __fmul_rn(base, unit)))};
  }

  // The natural log of the sum of exponentials.
  __device__ __forceinline__ float lse(float sum) const {
    if (sum == 0.0f) return -infinity();
    return fmaf(base, kLog2 ? kLn2 : 1.0f, kLn2 * log2f(sum));
  }

 private:
  static __device__ __forceinline__ float exponential(float score, float base) {
    if constexpr (kLog2) return exp2f(score - base);
    if constexpr (kExponential == Exponential::kNatural) return softmax_weight(score, base);
    return exp2f(__fmul_rn(score, unit_of(base)) - __fmul_rn(base, unit_of(base)));  // rounded as `weight` rounds bases
  }

  // log2(e). But of a base of 2^27 it would be rounded by up to 8, of 1e30 by 2^76. Scores so large differ by 16 and
  // more, so that weights are 1 or next to nothing in any unit, and this one leaves the base as it is.
  static __device__ __forceinline__ float unit_of(float base) { return fabsf(base) < 0x1p27f ? kLog2e : 1.0f; }
};

}  // namespace cuflash
