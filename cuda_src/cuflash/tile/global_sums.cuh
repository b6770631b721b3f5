// The sums of a tile in global memory, to which many blocks add: float32, in the order of registers, so that a warp
// adds to whole lines of memory.
#pragma once

#include <cuflash/ptx/reduce.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// The rows of a tile of sums for blocks that take kBlockM queries at once: a thread holds at most 64 of its sums.
__host__ __device__ constexpr int rows_of_sums(int block_m, int head_dim, int num_warps) {
  return block_m * head_dim <= 64 * 32 * num_warps ? block_m : block_m / 2;
}

// How the warps of a block share kRows x kCols sums: in a grid, each 32 rows, or 16 where that leaves whole 32 columns.
template <int kRows, int kCols, int kNumWarps>
struct GlobalSums {
  static constexpr int kRowsOfSums = kRows;
  static constexpr int kWarpRows = kRows % 32 == 0 && kRows / 32 * kCols / kNumWarps % 32 == 0 ? 32 : 16;
  static constexpr int kWarpsM = kRows / kWarpRows;
  static constexpr int kWarpsN = kNumWarps / kWarpsM;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kWarpCols = kCols / kWarpsN;

  static_assert(kNumWarps % kWarpsM == 0 && kWarpCols % 32 == 0);

  using Tile = WarpgroupTile<kWarpCols>;

  int warp = threadIdx.x / 32, row = warp / kWarpsN * kWarpRows, col = warp % kWarpsN * kWarpCols;

  __device__ __forceinline__ void add(float* sums, const Tile (&tiles)[kTilesM]) const {
    float* const own = ptx::of_lane(sums + warp * kWarpSums);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < Tile::kNumElements; i += 4) ptx::add_4(own + place(m, i), tiles[m].x + i);
    }
  }

  __device__ __forceinline__ void load(Tile (&tiles)[kTilesM], const float* sums) const {
    const float* const own = ptx::of_lane(sums + warp * kWarpSums);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < Tile::kNumElements; i += 4) ptx::load_4(tiles[m].x + i, own + place(m, i));
    }
  }

 private:
  static constexpr int kWarpSums = kTilesM * Tile::kNumElements * 32;

  static __device__ __forceinline__ constexpr int place(int m, int i) { return (m * Tile::kNumElements + i) * 32; }
};

}  // namespace cuflash
