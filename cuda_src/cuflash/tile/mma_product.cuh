// Products of a warp by mma.sync: sums in registers, factors by ldmatrix or in registers already.
#pragma once

#include <cuflash/ptx/mma.cuh>
#include <cuflash/tile/ldmatrix_tile.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// The first factor of a product, 16 x 16 elements at a time: rows of a tile in shared memory from a row or Corner on,
template <class Tile, class Start>
struct RowsOf {
  TileReader<Tile, Order::kByColumns, Start> reader;

  __device__ __forceinline__ RowsOf(const Tile& tile, Start start) : reader(tile, start) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int col) const {
    ptx::ldmatrix(x, reader.at(16 * m, col));
  }
};

// the same of the transposed tile: its columns from this one on,
template <class Tile>
struct ColumnsOf {
  TileReader<Tile, Order::kByRows, Corner> reader;

  __device__ __forceinline__ ColumnsOf(const Tile& tile, int col) : reader(tile, {0, col}) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int row) const {
    ptx::ldmatrix_transposed(x, reader.at(row, 16 * m));
  }
};

// or what registers hold already.
template <class Element, int kCols, int kTilesM>
struct RegistersOf {
  const WarpgroupFactor<Element, kCols> (&factors)[kTilesM];

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int col) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = factors[m].x[col / 16][i];
  }
};

template <class Element, int kCols, int kTilesM>
__device__ __forceinline__ RegistersOf<Element, kCols, kTilesM> registers_of(
    const WarpgroupFactor<Element, kCols> (&factors)[kTilesM]) {
  return {factors};
}

// sums[m] += A[m] B^T over kDepth columns, for rows of B from `start` on, a row or a Corner: first_factor(x, m, col)
// loads 16 x 16 elements of A. The compiler mixes an unrolled product with those before and after it, and keeps the
// factors and sums of all: kUnroll steps at a time it does not.
template <int kDepth, int kUnroll = kDepth / 16, int kTilesM, int kCols, class Element, int kRowsB, int kColsB,
          class FirstFactor, class Start = int>
__device__ __forceinline__ void add_product_along(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                                  const LdmatrixTile<Element, kRowsB, kColsB>& b,
                                                  const Start& start = 0) {
  const TileReader<LdmatrixTile<Element, kRowsB, kColsB>, Order::kByRows, Start> reader(b, start);
#pragma unroll(kUnroll)
  for (int k = 0; k < kDepth; k += 16) {
    unsigned factor[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) first_factor(factor[m], m, k);
#pragma unroll
    for (int n = 0; n < kCols; n += 16) {
      unsigned x[4];
      ptx::ldmatrix(x, reader.at(n, k));
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        ptx::mma<Element>(sums[m].x + n / 2, factor[m], x[0], x[1]);
        ptx::mma<Element>(sums[m].x + n / 2 + 4, factor[m], x[2], x[3]);
      }
    }
  }
}

// sums[m] += A[m] B over kDepth rows of B, for its rows and columns from `start` on.
template <int kDepth, int kUnroll = kDepth / 16, int kTilesM, int kCols, class Element, int kRowsB, int kColsB,
          class FirstFactor, class Start = int>
__device__ __forceinline__ void add_product_across(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                                   const LdmatrixTile<Element, kRowsB, kColsB>& b,
                                                   const Start& start = 0) {
  using TileB = LdmatrixTile<Element, kRowsB, kColsB>;
  using Reader = TileReader<TileB, Order::kByColumns, Start>;
  int first_col = 0;
  const Reader reader = [&] {
    if constexpr (TileB::template kKeepsGroups<kCols>) {
      return Reader(b, start);
    } else {
      first_col = start.col;
      return Reader(b, Corner{start.row, 0});
    }
  }();
#pragma unroll(kUnroll)
  for (int k = 0; k < kDepth; k += 16) {
    unsigned factor[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) first_factor(factor[m], m, k);
#pragma unroll
    for (int n = 0; n < kCols; n += 16) {
      unsigned x[4];
      ptx::ldmatrix_transposed(x, reader.at(k, first_col + n));
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        ptx::mma<Element>(sums[m].x + n / 2, factor[m], x[0], x[1]);
        ptx::mma<Element>(sums[m].x + n / 2 + 4, factor[m], x[2], x[3]);
      }
    }
  }
}

}  // namespace cuflash
