// Scores capped smoothly: cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118, section 2).
#pragma once

#include <cuflash/attention/options.cuh>

namespace cuflash {

// The short ways take the product of query and key as it comes: scale and cap are part of their coefficients, which
// cuflash/_features.py computes. They are as accurate as tanhf.
struct Softcap {
  float cap, inverse;   // 1 / cap
  float limits[2];      // how large products may be for the short ways
  float square[3];      // score / product: square[0] * ((product^2 + square[1])^2 + square[2])
  float reciprocal[5];  // product / score

  __device__ __forceinline__ bool allows(Size size, float largest_product) const {
    return largest_product < limits[static_cast<int>(size)];
  }

  template <Size kSize>
  __device__ __forceinline__ Dual score(float product, float scale) const {
    if constexpr (kSize == Size::kAny) {
      const float tanh = tanhf(product * scale * inverse);
      return {cap * tanh, slope(tanh)};
    } else {
      const Dual over = over_factor<kSize>(product);
      return {over.value * factor<kSize>(), over.slope};
    }
  }

  // The score as a product of two, of which kernels may leave the first one for later; with the slope of the score.
  template <Size kSize>
  __device__ __forceinline__ float factor() const {
    return kSize == Size::kSmall ? square[0] : 1.0f;
  }
  template <Size kSize>
  __device__ __forceinline__ Dual over_factor(float product) const {
    float value;
    if constexpr (kSize == Size::kSmall) {
      const float shifted = fmaf(product, product, square[1]);
      value = product * fmaf(shifted, shifted, square[2]);
    } else {
      value = __fdividef(product, sum(reciprocal, product * product));
    }
    return {value, slope(value * (factor<kSize>() * inverse))};
  }

 private:
  static __device__ __forceinline__ float slope(float tanh) { return fmaf(-tanh, tanh, 1.0f); }

  // The sum of coefficients[i] * x^i.
  template <int kCount>
  static __device__ __forceinline__ float sum(const float (&coefficients)[kCount], float x) {
    float result = coefficients[kCount - 1];
#pragma unroll
    for (int i = kCount - 2; i >= 0; --i) result = fmaf(x, result, coefficients[i]);
    return result;
  }
};

}  // namespace cuflash
