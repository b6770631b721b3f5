// Which weights survive dropout, where CUDA does not say which elements a lane holds.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/tile/fragment_map.cuh>

namespace cuflash {

// A bit for each element that a lane holds of kTilesM x kTilesN tiles of queries and keys, or of keys and queries if
// kTransposed. Lanes draw as attention/dropout.cuh says, and each asks those that drew for its own elements.
template <class Number, int kTilesM, int kTilesN, class Options, bool kTransposed = false>
struct FragmentSurvivors {
  static constexpr int kNumTiles = kTilesM * kTilesN;

  unsigned words[ceil_div(kNumTiles, 4)];  // a byte for each tile, those of 16 queries in a row

  __device__ __forceinline__ FragmentSurvivors(const FragmentMap<Number>& map, const Options& options, int first_query,
                                               int first_key) {
    if constexpr (Options::kHasDropout) {
      constexpr int kDrawn = kTilesOfKeys % 2 == 0 ? 2 : 1;  // then the first key is a multiple of 32
      unsigned query = first_query;
      ptx::make_opaque(query);  // as in drop
#pragma unroll
      for (int first = 0; first < kNumTiles; first += 4) {
        unsigned drawn = 0, mine = 0;
#pragma unroll
        for (int tile = first; tile < smaller(first + 4, kNumTiles); tile += kDrawn) {
          const Draw<kDrawn> draw =
              options.template draw<kDrawn>(query + tile / kTilesOfKeys * 16, first_key + tile % kTilesOfKeys * 16);
          drawn |= draw.template bits<false>() << 8 * (tile - first);
        }
#pragma unroll
        for (int i = 0; i < FragmentMap<Number>::kNumElements; ++i) {
          const int query = kTransposed ? map.col(i) : map.row(i), key = kTransposed ? map.row(i) : map.col(i);
          const unsigned of_owner = __shfl_sync(kFullMask, drawn, query % 8 * 4 + key % 8 / 2);
          mine |= (of_owner >> (key / 8 * 4 + query / 8 * 2 + key % 2) & 0x01010101u) << i;
        }
        words[first / 4] = mine;
      }
    }
  }

  __device__ __forceinline__ bool operator()(int m, int n, int i) const {
    if constexpr (Options::kHasDropout) {
      const int tile = kTransposed ? n * kTilesOfKeys + m : m * kTilesOfKeys + n;
      return words[tile / 4] >> (8 * (tile % 4) + i) & 1;
    } else {
      return true;
    }
  }

 private:
  static constexpr int kTilesOfKeys = kTransposed ? kTilesM : kTilesN;
};

}  // namespace cuflash
