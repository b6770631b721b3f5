// The number types a kernel can be built for: how elements are stored, and how the tensor cores multiply them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cuflash {

struct Float16 {
  using Element = __half;
};

struct BFloat16 {
  using Element = __nv_bfloat16;
};

// Each product as three TF32 products of high and low parts: about float32 accuracy.
struct Float32 {
  using Element = float;
};

// Each product as eight bfloat16 products of high, middle and low parts: float32 accuracy for a lone product too.
struct FullFloat32 {
  using Element = float;
};

// One TF32 product: 10 bits of mantissa go in, float32 comes out.
struct TFloat32 {
  using Element = float;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bool from_float<bool>(float x) {
  return x != 0.0f;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The type of two elements in one register.
template <class Element>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

// Adds 0 times a pair to a pair of zeros: they turn NaN when they meet NaN or infinity.
template <class Element>
__device__ __forceinline__ void note_non_finite(unsigned& zeros, unsigned pair) {
  using Pair = typename PairOf<Element>::Type;
  const unsigned zero = 0;
  const Pair sum = __hfma2(reinterpret_cast<const Pair&>(pair), reinterpret_cast<const Pair&>(zero),
                           reinterpret_cast<const Pair&>(zeros));
  zeros = reinterpret_cast<const unsigned&>(sum);
}

// Two neighbouring elements at once.
__device__ __forceinline__ void store_pair(float* address, float x, float y) {
  *reinterpret_cast<float2*>(address) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(__half* address, float x, float y) {
  *reinterpret_cast<__half2*>(address) = __floats2half2_rn(x, y);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* address, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(address) = __floats2bfloat162_rn(x, y);
}

}  // namespace cuflash
