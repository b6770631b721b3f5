// Rows of a tile in registers, rounded and written to global memory.
#pragma once

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

// Writes a tile from this row of a lane and this column on. The four lanes of a row exchange their pairs, so that each
// writes 16 bytes; the matrix must be `vectorized`. Returns whether the first of this lane's rows is finite.
template <class Element, int kCols>
__device__ __forceinline__ bool store_rows_16(const Matrix<Element>& target, const WarpgroupTile<kCols>& tile,
                                              const float (&factor)[2], int first_row, int first_col = 0) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane & 1, high = lane & 2;
  unsigned zeros = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    Element* const address = target.at(row, first_col) + 8 * lane;
#pragma unroll
    for (int col = 0; col < kCols; col += 32) {
      unsigned word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = (col / 8 + j) * 4 + 2 * r;
        word[j] = WarpgroupFactor<Element, kCols>::packed(tile.x[i] * factor[r], tile.x[i + 1] * factor[r]);
        if (r == 0) note_non_finite<Element>(zeros, word[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) exchange(word[j], word[j + 1], odd, 1);
#pragma unroll
      for (int j = 0; j < 2; ++j) exchange(word[j], word[j + 2], high, 2);
      if (row < target.rows && first_col + col + 8 * lane < target.cols) {
        ptx::store_16(address + col, word[0], word[1], word[2], word[3]);
      }
    }
  }
  return zeros == 0;
}

// The same for any strides and alignment.
template <class Element, int kCols>
__device__ __forceinline__ bool store_rows(const Matrix<Element>& target, const WarpgroupTile<kCols>& tile,
                                           const float (&factor)[2], int first_row, int first_col = 0) {
  if (target.vectorized) return store_rows_16(target, tile, factor, first_row, first_col);
  float zero = 0.0f;
#pragma unroll
  for (int i = 0; i < WarpgroupTile<kCols>::kNumElements; ++i) {
    const int row = first_row + 8 * row_of_element(i), col = first_col + col_of_element(i) + threadIdx.x % 4 * 2;
    const Element x = from_float<Element>(tile.x[i] * factor[row_of_element(i)]);
    if (row_of_element(i) == 0) zero = fmaf(to_float(x), 0.0f, zero);
    if (row < target.rows && col < target.cols) *target.at(row, col) = x;
  }
  return zero == 0.0f;
}

}  // namespace cuflash
