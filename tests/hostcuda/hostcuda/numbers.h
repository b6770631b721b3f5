// The floating-point types that tensor cores take, as float32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "hostcuda/arithmetic.h"

namespace hostcuda {

inline float to_float(float x) { return x; }
inline float to_float(__nv_bfloat16 x) { return bits_as<float>(uint32_t{bits_as<uint16_t>(x)} << 16); }
inline float to_float(__half x) {
#ifdef __F16C__
  return bits_as<_Float16>(x);
#else
  return __half2float(x);
#endif
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

constexpr uint32_t kTf32LostBits = 13;

// cvt.rna.tf32.f32: to 10 bits of mantissa; to nearest, ties away from zero. Infinities and NaNs stay what they are.
inline float round_to_tf32(float x) {
  if (!std::isfinite(x)) return x;
  const uint32_t half_unit = 1u << (kTf32LostBits - 1), mask = ~0u << kTf32LostBits;
  return bits_as<float>((bits_as<uint32_t>(x) + half_unit) & mask);
}

// What tensor cores do with a float32 that was not rounded before: they do not see its low bits.
inline float truncate_to_tf32(float x) { return bits_as<float>(bits_as<uint32_t>(x) & ~0u << kTf32LostBits); }

}  // namespace hostcuda

inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
  const auto fma_of = [](__half x, __half y, __half z) {
    return __float2half_rn(fmaf(hostcuda::to_float(x), hostcuda::to_float(y), hostcuda::to_float(z)));
  };
  return {fma_of(x.x, y.x, z.x), fma_of(x.y, y.y, z.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 x, __nv_bfloat162 y, __nv_bfloat162 z) {
  const auto fma_of = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return __float2bfloat16_rn(fmaf(hostcuda::to_float(x), hostcuda::to_float(y), hostcuda::to_float(z)));
  };
  return {fma_of(x.x, y.x, z.x), fma_of(x.y, y.y, z.y)};
}
