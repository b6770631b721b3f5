// Products of a warp by mma.sync: sums in registers, factors by ldmatrix or in registers already.
#pragma once

#include <cuflash/ptx/mma.cuh>
#include <cuflash/tile/ldmatrix_tile.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// The first factor of a product, 16 x 16 elements at a time: rows of a tile in shared memory from this one on,
template <class Tile>
struct RowsOf {
  TileReader<Tile, Order::kByColumns> reader;

  __device__ __forceinline__ RowsOf(const Tile& tile, int row) : reader(tile, row) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int col) const {
    reader.load(x, 16 * m, col);
  }
};

// the same of the transposed tile: its columns from this one on,
template <class Tile>
struct ColumnsOf {
  TileReader<Tile, Order::kByRows> reader;

  __device__ __forceinline__ ColumnsOf(const Tile& tile, int col) : reader(tile, 0, col) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int row) const {
    reader.load_transposed(x, row, 16 * m);
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

// sums[m] += A[m] B^T over kDepth columns, for rows of B from `row` on: first_factor(x, m, col) loads 16 x 16 elements
// of A.
template <int kDepth, int kUnroll = kDepth / 16, int kTilesM, int kCols, class Element, int kRowsB, int kColsB,
          class FirstFactor>
__device__ __forceinline__ void add_product_along(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                                  const LdmatrixTile<Element, kRowsB, kColsB>& b, int row = 0) {
  const TileReader<LdmatrixTile<Element, kRowsB, kColsB>, Order::kByRows> reader(b, row);
#pragma unroll(kUnroll)
  for (int k = 0; k < kDepth; k += 16) {
    unsigned factor[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) first_factor(factor[m], m, k);
#pragma unroll
    for (int n = 0; n < kCols; n += 16) {
      unsigned x[4];
      reader.load(x, n, k);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        ptx::mma<Element>(sums[m].x + n / 2, factor[m], x[0], x[1]);
        ptx::mma<Element>(sums[m].x + n / 2 + 4, factor[m], x[2], x[3]);
      }
    }
  }
}

// sums[m] += A[m] B over kDepth rows of B from `row` on, for its columns from `col` on. The compiler mixes an unrolled product with
// those before and after it, and keeps the sums of all: kUnroll steps at a time it does not.
template <int kDepth, int kUnroll = kDepth / 16, int kTilesM, int kCols, class Element, int kRowsB, int kColsB,
          class FirstFactor>
__device__ __forceinline__ void add_product_across(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                                   const LdmatrixTile<Element, kRowsB, kColsB>& b, int col = 0,
                                                   int row = 0) {
  using TileB = LdmatrixTile<Element, kRowsB, kColsB>;
  constexpr bool kConstantCols = TileB::template kKeepsGroups<kCols>;
  const TileReader<TileB, Order::kByColumns> reader(b, row, kConstantCols ? col : 0);
#pragma unroll(kUnroll)
  for (int k = 0; k < kDepth; k += 16) {
    unsigned factor[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) first_factor(factor[m], m, k);
#pragma unroll
    for (int n = 0; n < kCols; n += 16) {
      unsigned x[4];
      reader.load_transposed(x, k, (kConstantCols ? 0 : col) + n);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        ptx::mma<Element>(sums[m].x + n / 2, factor[m], x[0], x[1]);
        ptx::mma<Element>(sums[m].x + n / 2 + 4, factor[m], x[2], x[3]);
      }
    }
  }
}

}  // namespace cuflash
