// The online softmax of one row, in base 2 (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1).
#pragma once

#include <cuflash/common/math.cuh>

namespace cuflash {

// Scores are in units of log 2. After some tiles, the sum of the row's weights is sum * 2^base.
struct OnlineSoftmax {
  // A base up to 2^8 too small costs no accuracy, and earlier results are seldom rescaled.
  static constexpr float kSlack = 8.0f;

  float base = -infinity();

  // Takes note of the largest score of a new tile; returns the factor by which earlier sums must be scaled.
  __device__ __forceinline__ float rescale(float tile_max) {
    if (!(tile_max > base + kSlack || base == -infinity())) return 1.0f;
    const float factor = exp2f(base - tile_max);
    base = tile_max;
    return base == -infinity() ? 1.0f : factor;
  }

  // What to subtract from scores: finite as long as no score was seen, so that hidden scores get weight 0, not NaN.
  __device__ __forceinline__ float shift() const { return base == -infinity() ? 0.0f : base; }

  // The natural log of the sum of exponentials.
  __device__ __forceinline__ float lse(float sum) const {
    return sum == 0.0f ? -infinity() : kLn2 * (base + log2f(sum));
  }
};

}  // namespace cuflash
