// Scores capped smoothly: cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118, section 2).
#pragma once

#include <cuflash/attention/dual.cuh>

namespace cuflash {

struct Softcap {
  float cap, inverse;

  __device__ __forceinline__ Dual score(Dual score) const { return capped(score, tanhf(score.value * inverse)); }

  // Where no score comes near the cap, a polynomial is as accurate as tanh (1 ulp) at half the cost.
  __device__ __forceinline__ bool is_small(float score) const { return score * inverse < 0.55f; }
  __device__ __forceinline__ Dual score_if_small(Dual score) const {
    const float x = score.value * inverse, square = x * x;
    float rest = fmaf(square, 1.57394409e-2f, -5.2302558e-2f);
    rest = fmaf(square, rest, 1.3315247e-1f);
    rest = fmaf(square, rest, -3.33327681e-1f);
    return capped(score, fmaf(x * square, rest, x));
  }

 private:
  __device__ __forceinline__ Dual capped(Dual score, float tanh) const {
    return {cap * tanh, score.slope * fmaf(-tanh, tanh, 1.0f)};
  }
};

}  // namespace cuflash
