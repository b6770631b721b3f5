// Products in which hidden pairs must not take part, even if they hold NaN or infinity.
// A hidden pair has weight 0, but 0 * NaN is NaN. So the non-finite values are multiplied apart, where they are
// visible, and then cleared for the product on tensor cores. Slow: for the rare block that meets such a value.
#pragma once

#include <cuflash/tile/fragment_map.cuh>

namespace cuflash {

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }

// sum += A B over the pairs (row of A, k) that are visible and the elements of B that are not finite.
template <int kDepth, class Number, int kTilesM, int kTilesN, class Visible>
__device__ __forceinline__ void add_non_finite(WarpTile<Number, kTilesM, kTilesN>& sum, FragmentMap<Number>& map,
                                               const typename Number::Element* a, int pitch_a,
                                               const typename Number::Element* b, int pitch_b, Visible visible) {
#pragma unroll 1
  for (int k = 0; k < kDepth; ++k) {
    map.stay_packed();
    sum.for_each([&](float& x, int m, int n, int i) {
      const int row = 16 * m + map.row(i);
      const float factor = to_float(b[k * pitch_b + 16 * n + map.col(i)]);
      if (!is_finite(factor) && visible(row, k)) x += to_float(a[row * pitch_a + k]) * factor;
    });
  }
}

// Sets what is not finite in a tile to 0, once no thread of the block needs it any more.
template <int kRows, int kCols, int kNumThreads, class T>
__device__ __forceinline__ void clear_non_finite(T* tile) {
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * kCols; index += kNumThreads) {
    T& element = tile[index / kCols * padded<T>(kCols) + index % kCols];
    if (!is_finite(to_float(element))) element = from_float<T>(0.0f);
  }
  __syncthreads();
}

}  // namespace cuflash
