// 16 x 16 products by mma.sync, for each type of number.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/ptx/mma.cuh>
#include <cuflash/ptx/permute.cuh>

namespace cuflash {

// The depth of one product: 32 bytes of a row.
template <class Number>
constexpr int kMmaDepth = 32 / static_cast<int>(sizeof(typename Number::Element));

// A factor in the registers of a warp: 16 rows of A, or 16 columns of B, whose second 8 are in x[2] and x[3].
template <class Number>
struct MmaFactor {
  unsigned x[4];

  // From what memory holds, of A or of B.
  template <bool kIsB>
  __device__ __forceinline__ void convert() {}
};

// sum[0..7] += a b, as WarpgroupTile has 16 columns.
template <class Number>
__device__ __forceinline__ void multiply_add(float* sum, const MmaFactor<Number>& a, const MmaFactor<Number>& b) {
  using Element = typename Number::Element;
  ptx::mma<Element>(sum, a.x, b.x[0], b.x[1]);
  ptx::mma<Element>(sum + 4, a.x, b.x[2], b.x[3]);
}

// A float to the nearest TF32 number, which has 10 bits of mantissa. Tensor cores leave out the other 13, so that half
// a unit of the last one is added here. Of some NaN that would make numbers.
__device__ __forceinline__ unsigned to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

template <>
struct MmaFactor<TFloat32> {
  unsigned x[4];

  template <bool kIsB>
  __device__ __forceinline__ void convert() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = __uint_as_float(x[i]);
      if (fabsf(value) < infinity()) x[i] = to_tf32(value);
    }
  }
};

template <class Number>
constexpr int kMmaParts = 1;
template <>
constexpr int kMmaParts<Float32> = 2;
template <>
constexpr int kMmaParts<FullFloat32> = 3;

// As for wmma (tile/factor_sm80.cuh), the sum of two TF32 numbers, of which the low one takes NaN, infinity, and what
// would be rounded to infinity. Otherwise it has 12 bits, of which tensor cores leave out one at most: it is not
// rounded.
template <>
struct MmaFactor<Float32> {
  unsigned x[4], high[4], low[4];

  template <bool kIsB>
  __device__ __forceinline__ void convert() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = __uint_as_float(x[i]);
      high[i] = fabsf(value) < 0x1.ffep127f ? to_tf32(value) & ~0x1fffu : 0u;
      low[i] = __float_as_uint(value - __uint_as_float(high[i]));
    }
  }
};

// Small terms are added first, and sums are taken outside of the tensor core, which would cut them off.
__device__ __forceinline__ void multiply_add(float* sum, const MmaFactor<Float32>& a, const MmaFactor<Float32>& b) {
  float product[8] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ptx::mma<float>(product + 4 * half, a.low, b.high[2 * half], b.high[2 * half + 1]);
    ptx::mma<float>(product + 4 * half, a.high, b.low[2 * half], b.low[2 * half + 1]);
    ptx::mma<float>(product + 4 * half, a.high, b.high[2 * half], b.high[2 * half + 1]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += product[i];
}

// The sum of three bfloat16 numbers, each 8 of 24 bits: cut off, so that the parts have the same sign. The low part
// takes NaN and infinity; what meets a second part, which may be 0, is `finite_low`.
template <>
struct MmaFactor<FullFloat32> {
  unsigned x[4];
  // Of rows of A, or columns of B, 8 apart: a word has two depths, 4 apart.
  unsigned high[2], middle[2], low[2], finite_low[2];

  template <bool kIsB>
  __device__ __forceinline__ void convert() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned pair[2] = {x[kIsB ? 2 * i : i], x[kIsB ? 2 * i + 1 : i + 2]};
      unsigned highs[2], middles[2], lows[2], masks[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = __uint_as_float(pair[j]);
        const unsigned mask = masks[j] = fabsf(value) < infinity() ? 0xffff0000u : 0u;
        highs[j] = pair[j] & mask;
        const float rest = value - __uint_as_float(highs[j]);
        middles[j] = __float_as_uint(rest) & mask;
        lows[j] = __float_as_uint(rest - __uint_as_float(middles[j]));
      }
      high[i] = upper_halves(highs);
      middle[i] = upper_halves(middles);
      low[i] = upper_halves(lows);
      finite_low[i] = low[i] & upper_halves(masks);
    }
  }

 private:
  static __device__ __forceinline__ unsigned upper_halves(const unsigned (&x)[2]) {
    return ptx::permute(x[0], x[1], 0x7632);
  }
};

// Of the nine products of parts, each 8 deep, eight count: a product 16 deep computes two. As above, small ones first.
__device__ __forceinline__ void multiply_add(float* sum, const MmaFactor<FullFloat32>& a,
                                             const MmaFactor<FullFloat32>& b) {
  const unsigned lows[4] = {a.low[0], a.low[1], a.finite_low[0], a.finite_low[1]};
  const unsigned high_and_middle[4] = {a.high[0], a.high[1], a.middle[0], a.middle[1]};
  const unsigned middle_and_high[4] = {a.middle[0], a.middle[1], a.high[0], a.high[1]};
  float product[8] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ptx::mma<__nv_bfloat16>(product + 4 * half, high_and_middle, b.low[half], b.finite_low[half]);
    ptx::mma<__nv_bfloat16>(product + 4 * half, lows, b.high[half], b.middle[half]);
    ptx::mma<__nv_bfloat16>(product + 4 * half, middle_and_high, b.high[half], b.middle[half]);
    ptx::mma<__nv_bfloat16>(product + 4 * half, high_and_middle, b.high[half], b.middle[half]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += product[i];
}

}  // namespace cuflash
