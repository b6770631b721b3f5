// Which pairs of a tile that a warp holds in registers options hide.
#pragma once

#include <cuflash/attention/register_softmax.cuh>

namespace cuflash {

// Options are asked about each element where it lies, by a copy of their code for each: all tiles are asked.
template <class Options, int kTilesM, int kCols, int kNumThreads, bool kSkipsBlocks = Options::kSkipsBlocks>
struct alignas(16) HiddenPairs {
  __device__ __forceinline__ void find(int, const TileOfPairs<Options>&) {}

  __device__ __forceinline__ void hide(int, const TileOfPairs<Options>& tile, WarpgroupTile<kCols>& scores) const {
    tile.hide_by_options(scores);
  }
};

// With a block mask few tiles are asked, and the others must not lack the registers. So it is done before the product,
// while there are no scores, in a loop; and the answers wait in shared memory, a bit for each element of a lane.
template <class Options, int kTilesM, int kCols, int kNumThreads>
struct alignas(16) HiddenPairs<Options, kTilesM, kCols, kNumThreads, true> {
  static constexpr int kBits = smaller(32, kCols / 2), kWords = kCols / 2 / kBits;

  unsigned words[kTilesM][kWords][kNumThreads];

  __device__ __forceinline__ void find(int m, const TileOfPairs<Options>& tile) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      words[m][word][threadIdx.x] = tile.pairs.options_hide_nothing() ? 0 : bits_of(tile, word * kBits);
    }
  }

  __device__ __forceinline__ void hide(int m, const TileOfPairs<Options>&, WarpgroupTile<kCols>& scores) const {
    unsigned hidden[kWords], any = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) any |= hidden[word] = words[m][word][threadIdx.x];
    if (!__any_sync(kFullMask, any)) return;
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      if (hidden[i / kBits] >> i % kBits & 1) scores.x[i] = -infinity();
    }
  }

 private:
  // Of the elements from this one on, 4 at a time, which are two columns of both rows.
  static __device__ __forceinline__ unsigned bits_of(const TileOfPairs<Options>& tile, int first) {
    unsigned hidden = 0;
#pragma unroll 1
    for (int i = first; i < first + kBits; i += 4) {
      hidden >>= 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!tile.shown_by_options(j, 2 * i)) hidden |= 1u << (kBits - 4 + j);
      }
    }
    return hidden;
  }
};

}  // namespace cuflash
