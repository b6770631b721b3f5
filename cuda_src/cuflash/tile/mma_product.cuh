// Products of a warp by mma.sync: sums in registers, factors from shared memory or in registers already.
#pragma once

#include <cuflash/ptx/load_shared.cuh>
#include <cuflash/tile/ldmatrix_tile.cuh>
#include <cuflash/tile/mma_factor.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// The first factor of a product, 16 rows and kMmaDepth at a time: rows of a tile in shared memory from a row or Corner
// on,
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

// or what registers hold already,
template <class Element, int kCols, int kTilesM>
struct RegistersOf {
  const WarpgroupFactor<Element, kCols> (&factors)[kTilesM];

  __device__ __forceinline__ explicit RegistersOf(const WarpgroupFactor<Element, kCols> (&factors)[kTilesM])
      : factors(factors) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int col) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = factors[m].x[col / 16][i];
  }
};

// which a loop cannot tell by a number: of float32 the next move to the place of those just given.
template <int kCols, int kTilesM>
struct RegistersOf<float, kCols, kTilesM> {
  WarpgroupFactor<float, kCols> left[kTilesM];

  __device__ __forceinline__ explicit RegistersOf(const WarpgroupFactor<float, kCols> (&factors)[kTilesM]) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) left[m] = factors[m];
  }

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = left[m].x[0][i];
#pragma unroll
      for (int step = 1; step < kCols / 8; ++step) left[m].x[step - 1][i] = left[m].x[step][i];
    }
  }
};

// Of 16 bits the first columns may come from registers, and the others from shared memory.
template <class Element, int kCols, int kTilesM, class Others>
struct FirstKept {
  RegistersOf<Element, kCols, kTilesM> kept;
  const Others& others;

  __device__ __forceinline__ FirstKept(const WarpgroupFactor<Element, kCols> (&factors)[kTilesM], const Others& others)
      : kept(factors), others(others) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int m, int col) const {
    if (col < kCols) {
      kept(x, m, col);
    } else {
      others(x, m, col);
    }
  }
};

// A second factor across the rows of a tile, kMmaDepth and 16 columns at a time: ldmatrix transposes 16-bit elements,
template <class Tile, class Start, int kSize = Tile::kSize>
struct AcrossReader {
  TileReader<Tile, Order::kByColumns, Start> reader;

  __device__ __forceinline__ AcrossReader(const Tile& tile, const Start& start) : reader(tile, start) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int row, int col) const {
    ptx::ldmatrix_transposed(x, reader.at(row, col));
  }
};

// others come word by word, in the order of a first factor in registers (WarpgroupFactor). The words of a load, of 4
// even or odd rows and of two pieces of each, lie in all banks.
template <class Tile, class Start>
struct AcrossReader<Tile, Start, 4> {
  TileReader<Tile, Order::kEvenRows, Start> even;
  TileReader<Tile, Order::kOddRows, Start> odd;

  __device__ __forceinline__ AcrossReader(const Tile& tile, const Start& start) : even(tile, start), odd(tile, start) {}

  __device__ __forceinline__ void operator()(unsigned (&x)[4], int row, int col) const {
    x[0] = ptx::load_shared(even.at(row, col));
    x[1] = ptx::load_shared(odd.at(row, col));
    x[2] = ptx::load_shared(even.at(row, col + 8));
    x[3] = ptx::load_shared(odd.at(row, col + 8));
  }
};

// How many steps of products a loop should have at once. Factors in parts fill the registers: of products along B
// as many as make 8 independent sums of 16 x 8, which keep tensor cores busy, across it as many as have 128 columns.
// Others have enough registers for `all`.
template <class Number>
__host__ __device__ constexpr int unroll_along(int tiles, int cols, int all) {
  return kMmaParts<Number> > 1 ? larger(1, 64 / (tiles * cols)) : all;
}
template <class Number>
__host__ __device__ constexpr int unroll_across(int cols, int all) {
  return kMmaParts<Number> > 1 ? larger(1, 128 / cols) : all;
}

// sums[m] += A[m] B over kDepth: first_factor(x, m, k) loads 16 rows of A, second_factor(x, k, n) 16 columns of B. The
// compiler mixes an unrolled product with those before and after it, and keeps the factors and sums of all: kUnroll
// steps at a time it does not.
template <class Number, int kDepth, int kUnroll, int kTilesM, int kCols, class FirstFactor, class SecondFactor>
__device__ __forceinline__ void add_product(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                            const SecondFactor& second_factor) {
#pragma unroll(kUnroll)
  for (int k = 0; k < kDepth; k += kMmaDepth<Number>) {
    MmaFactor<Number> factor[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      first_factor(factor[m].x, m, k);
      factor[m].template convert<false>();
    }
#pragma unroll
    for (int n = 0; n < kCols; n += 16) {
      MmaFactor<Number> other;
      second_factor(other.x, k, n);
      other.template convert<true>();
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) multiply_add(sums[m].x + n / 2, factor[m], other);
    }
  }
}

// sums[m] += A[m] B^T over kDepth columns, for rows of B from `start` on, a row or a Corner.
template <int kDepth, int kUnroll = kDepth / 16, int kTilesM, int kCols, class Number, int kRowsB, int kColsB,
          class FirstFactor, class Start = int>
__device__ __forceinline__ void add_product_along(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                                  const LdmatrixTile<Number, kRowsB, kColsB>& b,
                                                  const Start& start = 0) {
  const TileReader<LdmatrixTile<Number, kRowsB, kColsB>, Order::kByRows, Start> reader(b, start);
  add_product<Number, kDepth, kUnroll>(sums, first_factor,
                                       [&](unsigned (&x)[4], int k, int n) { ptx::ldmatrix(x, reader.at(n, k)); });
}

// sums[m] += A[m] B over kDepth rows of B, for its rows and columns from `start` on.
template <int kDepth, int kUnroll = kDepth / 16, int kTilesM, int kCols, class Number, int kRowsB, int kColsB,
          class FirstFactor, class Start = int>
__device__ __forceinline__ void add_product_across(WarpgroupTile<kCols> (&sums)[kTilesM], FirstFactor first_factor,
                                                   const LdmatrixTile<Number, kRowsB, kColsB>& b,
                                                   const Start& start = 0) {
  using TileB = LdmatrixTile<Number, kRowsB, kColsB>;
  using Reader = AcrossReader<TileB, Start>;
  int first_col = 0;
  const Reader reader = [&] {
    if constexpr (TileB::template kKeepsGroups<kCols>) {
      return Reader(b, start);
    } else {
      first_col = start.col;
      return Reader(b, Corner{start.row, 0});
    }
  }();
  add_product<Number, kDepth, kUnroll>(sums, first_factor,
                                       [&](unsigned (&x)[4], int k, int n) { reader(x, k, first_col + n); });
}

}  // namespace cuflash
