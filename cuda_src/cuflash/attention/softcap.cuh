// Scores capped smoothly: cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118, section 2).
#pragma once

#include <cuflash/attention/dual.cuh>

namespace cuflash {

// With kPrecise as accurate as float32 allows. Else to 1e-7 of the cap, far below what 16-bit weights show: where the
// tensor cores take 16-bit numbers, a tanh of more than a few instructions would cost as much as the products.
template <bool kPrecise>
struct Softcap {
  float cap, inverse;

  __device__ __forceinline__ Dual score(Dual score) const {
    if constexpr (kPrecise) {
      const float t = tanhf(score.value * inverse);
      return {cap * t, score.slope * fmaf(-t, t, 1.0f)};
    } else {
      const float half_rest = __fdividef(1.0f, exp2f(2.0f * kLog2e * inverse * score.value) + 1.0f);
      const float t = fmaf(-2.0f, half_rest, 1.0f);
      return {fmaf(-2.0f * cap, half_rest, cap), score.slope * fmaf(-t, t, 1.0f)};
    }
  }
};

}  // namespace cuflash
