// Tiles in registers to rows of a matrix in global memory.
#pragma once

#include <cuflash/ptx/opaque.cuh>
#include <cuflash/ptx/store.cuh>
#include <cuflash/tile/matrix.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// One of two lanes gives its x for the other's y.
__device__ __forceinline__ void exchange(unsigned& x, unsigned& y, bool second, int distance) {
  const unsigned other = __shfl_xor_sync(kFullMask, second ? x : y, distance);
  if (second) {
    x = other;
  } else {
    y = other;
  }
}

// Writes a tile times a factor for each of the two rows of which this lane has a part: the first is out's `first_row`,
// the second 8 further. Lanes exchange their pairs, so that each writes 16 bytes, or 8: half the exchanges, twice the
// stores. Returns whether this lane's part of the first row is finite, or of both: one is enough where whatever spoils
// a row spoils all (V in out, dO in dV). The matrix must be `vectorized`.
template <int kLaneBytes, bool kLooksAtBoth = false, class Element, int kCols>
__device__ __forceinline__ bool store_vectorized_rows(const Matrix<Element>& out, const WarpgroupTile<kCols>& tile,
                                                      const float (&factor)[2], int first_row, int first_col = 0) {
  static_assert(kLaneBytes == 8 || kLaneBytes == 16);
  constexpr int kWords = kLaneBytes / 4;
  const int lane = threadIdx.x % 4;
  const bool odd = lane & 1, high = lane & 2;
  const int lane_col = kWords == 4 ? 8 * lane : 8 * odd + 4 * high;
  unsigned zeros = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    Element* target = out.at(row, first_col) + lane_col;
    ptx::make_opaque(target);  // else each store has an address of its own
#pragma unroll
    for (int col = 0; col < kCols; col += 8 * kWords) {
      unsigned words[kWords];
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const int i = (col / 8 + j) * 4 + 2 * r;
        words[j] = WarpgroupFactor<Element, 16>::packed(tile.x[i] * factor[r], tile.x[i + 1] * factor[r]);
        if (r == 0 || kLooksAtBoth) note_non_finite<Element>(zeros, words[j]);
      }
#pragma unroll
      for (int j = 0; j < kWords; j += 2) exchange(words[j], words[j + 1], odd, 1);
#pragma unroll
      for (int j = 0; j + 2 < kWords; ++j) exchange(words[j], words[j + 2], high, 2);
      if (row < out.rows && first_col + col + lane_col < out.cols) ptx::store(target + col, words);
    }
  }
  return zeros == 0;
}

// The same for any strides and alignment; looks at the first row.
template <class Element, int kCols>
__device__ __forceinline__ bool store_rows(const Matrix<Element>& out, const WarpgroupTile<kCols>& tile,
                                           const float (&factor)[2], int first_row, int first_col = 0) {
  if constexpr (sizeof(Element) == 2) {
    if (out.vectorized) return store_vectorized_rows<16>(out, tile, factor, first_row, first_col);
  }
  float zero = 0.0f;
#pragma unroll
  for (int i = 0; i < WarpgroupTile<kCols>::kNumElements; ++i) {
    const int row = first_row + 8 * row_of_element(i), col = first_col + col_of_element(i) + threadIdx.x % 4 * 2;
    const Element x = from_float<Element>(tile.x[i] * factor[row_of_element(i)]);
    if (row_of_element(i) == 0) zero = fmaf(to_float(x), 0.0f, zero);
    if (row < out.rows && col < out.cols) *out.at(row, col) = x;
  }
  return zero == 0.0f;
}

}  // namespace cuflash
