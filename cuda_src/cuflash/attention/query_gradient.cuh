// Sums of dQ in memory, to which many blocks of threads add: in the order in which warpgroups hold them.
#pragma once

#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// A tile of queries of one head is two parts that a warpgroup holds, one after the other: 64 of 128 queries, or half of
// the columns.
template <int kHeadDim, int kBlockM>
struct QueryGradient {
  static constexpr bool kSplitsQueries = kBlockM == 128;
  static constexpr int kCols = kSplitsQueries ? kHeadDim : kHeadDim / 2;
  static constexpr int kParts = 2;
  static constexpr int kPieces = kCols / 8;  // of 16 bytes, that a thread holds
  using Part = WarpgroupTile<kCols>;

  static __device__ __forceinline__ int first_query(int part) { return kSplitsQueries ? 64 * part : 0; }
  static __device__ __forceinline__ int first_col(int part) { return kSplitsQueries ? 0 : kCols * part; }

  // Where a thread of the warpgroup finds its first piece; the others are 32 pieces further each, so that those of a
  // warp lie together.
  static __device__ __forceinline__ float4* pieces(float* sums, long long tile, int part, int thread) {
    return reinterpret_cast<float4*>(sums) + (tile * kParts + part) * (kPieces * 128) + thread / 32 * (kPieces * 32) +
           thread % 32;
  }
};

}  // namespace cuflash
