// Products of a warpgroup by wgmma, started and closed as a group of their own: sums in registers, second factors in
// shared memory.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/ptx/opaque.cuh>
#include <cuflash/tile/swizzled_tile.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// The first of the 64 rows that are a consumer's, computed anew for each product: else a loop whose first factors stay
// the same keeps descriptors of all of them, for which registers are too few.
__device__ __forceinline__ int first_row_of(unsigned consumer) {
  ptx::make_opaque(consumer);
  return 64 * uniform(consumer);
}

// sum = a b^T over kDepth columns of both, for 64 rows of a from `row` on; added to what is there if `adds`.
template <int kDepth, class Element, int kRowsA, int kColsA, int kRowsB, int kColsB>
__device__ __forceinline__ void start_product_along(WarpgroupTile<kRowsB>& sum,
                                                    const SwizzledTile<Element, kRowsA, kColsA>& a, int row,
                                                    const SwizzledTile<Element, kRowsB, kColsB>& b, bool adds = false) {
  ptx::wgmma_fence();
#pragma unroll
  for (int col = 0; col < kDepth; col += 16) {
    ptx::Wgmma<Element, kRowsB>::template multiply<false, false>(sum.x, a.along(row, col), b.along(0, col),
                                                                 adds || col > 0);
  }
  ptx::wgmma_commit();
}

// sum = a^T b over the rows of both, for 64 columns of a and those of b, from these on.
template <int kCols, class Element, int kDepth, int kColsA, int kColsB>
__device__ __forceinline__ void start_product_across(WarpgroupTile<kCols>& sum,
                                                     const SwizzledTile<Element, kDepth, kColsA>& a, int col_a,
                                                     const SwizzledTile<Element, kDepth, kColsB>& b, int col_b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int row = 0; row < kDepth; row += 16) {
    ptx::Wgmma<Element, kCols>::template multiply<true, true>(sum.x, a.across(row, col_a), b.across(row, col_b),
                                                              row > 0);
  }
  ptx::wgmma_commit();
}

// sum += a b, over the rows of b.
template <int kCols, class Element, int kDepth, int kColsB>
__device__ __forceinline__ void start_adding_across(WarpgroupTile<kCols>& sum,
                                                    const WarpgroupFactor<Element, kDepth>& a,
                                                    const SwizzledTile<Element, kDepth, kColsB>& b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int row = 0; row < kDepth; row += 16) {
    ptx::Wgmma<Element, kCols>::template multiply<true>(sum.x, a.x[row / 16], b.across(row), true);
  }
  ptx::wgmma_commit();
}

}  // namespace cuflash
