// Scores capped smoothly: cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118, section 2).
#pragma once

#include <cuflash/attention/options.cuh>

namespace cuflash {

// The short ways take the product of query and key as it comes: scale and cap are part of their coefficients, which
// cuflash/_features.py computes. They are as accurate as tanhf.
struct Softcap {
  float cap, inverse;   // 1 / cap
  float limits[2];      // how large products may be for the short ways
  float polynomial[3];  // score / product, by the powers of the product's square
  float reciprocal[5];  // product / score

  __device__ __forceinline__ bool allows(Size size, float largest_product) const {
    return largest_product < limits[static_cast<int>(size)];
  }

  template <Size kSize>
  __device__ __forceinline__ Dual score(float product, float scale) const {
    if constexpr (kSize == Size::kAny) {
      const float tanh = tanhf(product * scale * inverse);
      return capped(cap * tanh, tanh);
    } else {
      const float square = product * product;
      const float value =
          kSize == Size::kSmall ? product * sum(polynomial, square) : __fdividef(product, sum(reciprocal, square));
      return capped(value, value * inverse);
    }
  }

 private:
  static __device__ __forceinline__ Dual capped(float value, float tanh) { return {value, fmaf(-tanh, tanh, 1.0f)}; }

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
