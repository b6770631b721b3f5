// One bit for each element of a tile, drawn by whichever lane finds it cheap, used by the lane that holds the element.
#pragma once

#include <cuflash/tile/fragment_map.cuh>

namespace cuflash {

// Lanes draw bytes: bit 4 i + 2 j + c of lane l is for row 8 i + l / 4 and column 8 j + 2 (l % 4) + c of a 16 x 16
// tile, or for that column and row if kTransposed. Without kDrawn there is nothing to draw: every bit is 1.
template <class Number, int kTilesM, int kTilesN, bool kDrawn, bool kTransposed = false>
struct BitTile {
  static constexpr int kNumTiles = kTilesM * kTilesN;

  unsigned words[ceil_div(kNumTiles, 4)];  // a byte for each 16 x 16 tile, a bit for each element that this lane holds

  // draw(m, n) gives this lane's byte of a tile.
  template <class Draw>
  __device__ __forceinline__ BitTile(const FragmentMap<Number>& map, Draw draw) {
    if constexpr (kDrawn) {
#pragma unroll
      for (int first = 0; first < kNumTiles; first += 4) {
        unsigned drawn = 0, mine = 0;
#pragma unroll
        for (int tile = first; tile < smaller(first + 4, kNumTiles); ++tile) {
          drawn |= draw(tile / kTilesN, tile % kTilesN) << 8 * (tile - first);
        }
#pragma unroll
        for (int i = 0; i < FragmentMap<Number>::kNumElements; ++i) {
          const int row = kTransposed ? map.col(i) : map.row(i), col = kTransposed ? map.row(i) : map.col(i);
          const unsigned of_owner = __shfl_sync(kFullMask, drawn, row % 8 * 4 + col % 8 / 2);
          mine |= (of_owner >> (row / 8 * 4 + col / 8 * 2 + col % 2) & 0x01010101u) << i;
        }
        words[first / 4] = mine;
      }
    }
  }

  __device__ __forceinline__ bool operator()(int m, int n, int i) const {
    if constexpr (kDrawn) {
      const int tile = m * kTilesN + n;
      return words[tile / 4] >> (8 * (tile % 4) + i) & 1;
    } else {
      return true;
    }
  }
};

}  // namespace cuflash
