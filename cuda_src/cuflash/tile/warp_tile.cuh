// Tiles of sums that a warp holds, and matrix products that add to them.
#pragma once

#include <cuflash/tile/factor.cuh>
#if __CUDA_ARCH__ >= 800
#include <cuflash/tile/factor_sm80.cuh>
#endif

namespace cuflash {

// How B lies in memory: by its rows, or as its transpose.
enum class Stored { kByRows, kTransposed };
template <Stored kStored>
struct LayoutOf {
  using Type = wmma::row_major;
};
template <>
struct LayoutOf<Stored::kTransposed> {
  using Type = wmma::col_major;
};

// A (16 kTilesM) x (16 kTilesN) tile of float32 sums, held by one warp.
template <class Number, int kTilesM, int kTilesN>
struct WarpTile {
  using Element = typename Number::Element;

  // More would keep more fragments in flight than there are registers.
  static constexpr int kUnroll = sizeof(Element) == 2 ? 4 : 1;

  Accumulator<Number> tile[kTilesM][kTilesN];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) wmma::fill_fragment(tile[m][n], 0.0f);
    }
  }

  // this += A B, summed over kDepth. A is stored by rows; pitches are the lengths of stored rows.
  template <int kDepth, Stored kStoredB>
  __device__ __forceinline__ void add_product(const Element* a, int pitch_a, const Element* b, int pitch_b) {
#pragma unroll(kUnroll)
    for (int k = 0; k < kDepth; k += kFragmentDepth<Number>) {
      Factor<Number, wmma::matrix_a, wmma::row_major> factor_a[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) factor_a[m].load(a + 16 * m * pitch_a + k, pitch_a);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        Factor<Number, wmma::matrix_b, typename LayoutOf<kStoredB>::Type> factor_b;
        factor_b.load(kStoredB == Stored::kByRows ? b + k * pitch_b + 16 * n : b + 16 * n * pitch_b + k, pitch_b);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) multiply_add(tile[m][n], factor_a[m], factor_b);
      }
    }
  }

  // Whether this lane holds NaN or infinity: either makes NaN of a sum of zeros.
  __device__ __forceinline__ bool has_non_finite() {
    float zero = 0.0f;
    for_each([&](float& x, int, int, int) { zero = fmaf(x, 0.0f, zero); });
    return zero != 0.0f;
  }

  // The largest magnitude that this lane holds. Several maxima at once: one would wait for itself at every element.
  __device__ __forceinline__ float largest() {
    constexpr int kNumElements = Accumulator<Number>::num_elements;
    float maxima[kNumElements] = {};
    for_each([&](float& x, int, int, int i) { maxima[i] = fmaxf(maxima[i], fabsf(x)); });
#pragma unroll
    for (int i = 1; i < kNumElements; ++i) maxima[0] = fmaxf(maxima[0], maxima[i]);
    return maxima[0];
  }

  // Calls function(x, m, n, i) for every element x that this lane holds: number i of tile (m, n).
  template <class Function>
  __device__ __forceinline__ void for_each(Function function) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int i = 0; i < Accumulator<Number>::num_elements; ++i) function(tile[m][n].x[i], m, n, i);
      }
    }
  }
};

}  // namespace cuflash
