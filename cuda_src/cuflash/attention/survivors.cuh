// Which weights survive dropout, for the lanes that hold them (attention/dropout.cuh says who draws what).
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/ptx/opaque.cuh>

namespace cuflash {

// Clears the weights that are dropped of a warp's 16 queries and of all keys of a tile: rounded weights, as the factor
// of a product. A lane draws for the very pairs that it holds.
template <class Options, class Weights>
__device__ __forceinline__ void drop(const Options& options, Weights& weights, int first_query, int first_key) {
  if constexpr (Options::kHasDropout) {
    constexpr int kTiles = Weights::kNumElements % 16 == 0 ? 2 : 1;
    unsigned query = first_query;
    ptx::make_opaque(query);  // what follows from it alone would keep registers from tile to tile
#pragma unroll
    for (int first = 0; first < Weights::kNumElements; first += 8 * kTiles) {
      unsigned key = first_key + 2 * first;
      ptx::make_opaque(key);  // one draw after another: all at once would not fit the registers
      const Draw<kTiles> draw = options.template draw<kTiles>(query, key);
#pragma unroll
      for (int i = 0; i < 8 * kTiles; i += 2) weights.keep(first + i, draw.pair(i));
    }
  }
}

// A bit for each element that a lane holds of a warp's 16 rows. The rows are queries, or keys if kTransposed.
template <class Options, int kCols, bool kTransposed>
struct Survivors {
  unsigned words[ceil_div(kCols, 64)];

  __device__ __forceinline__ Survivors(const Options& options, int first_query, int first_key) {
    if constexpr (Options::kHasDropout) {
      constexpr int kTiles = !kTransposed && kCols % 32 == 0 ? 2 : 1;
#pragma unroll
      for (int word = 0; word < ceil_div(kCols, 64); ++word) {
        unsigned drawn = 0;
#pragma unroll
        for (int col = 64 * word; col < smaller(kCols, 64 * word + 64); col += 16 * kTiles) {
          unsigned at = (kTransposed ? first_query : first_key) + col;
          ptx::make_opaque(at);  // as above
          const Draw<kTiles> draw =
              options.template draw<kTiles>(kTransposed ? at : first_query, kTransposed ? first_key : at);
          drawn |= draw.template bits<kTransposed>() << col % 64 / 2;
        }
        words[word] = kTransposed ? transposed(drawn) : drawn;
      }
    }
  }

  __device__ __forceinline__ bool operator()(int i) const {
    if constexpr (Options::kHasDropout) {
      return words[i / 32] >> i % 32 & 1;
    } else {
      return true;
    }
  }

 private:
  // Element i is for key 8 (i / 2 % 2) + lane / 4 and query 8 (i / 4) + 2 (lane % 4) + i % 2. So the lanes that drew
  // for these two queries have the bits of even and odd elements, in their bits for even or odd keys.
  static __device__ __forceinline__ unsigned transposed(unsigned drawn) {
    const int key = threadIdx.x % 32 / 4, query = threadIdx.x % 4 * 2;
    const unsigned even = __shfl_sync(kFullMask, drawn, query * 4 + key / 2) >> key % 2;
    const unsigned odd = __shfl_sync(kFullMask, drawn, query * 4 + 4 + key / 2) >> key % 2;
    return (even & 0x55555555u) | (odd & 0x55555555u) << 1;
  }
};

// Whether the pair of this lane survives, if those of a warp lie in the same 16 queries and 32 keys.
template <class Options>
__device__ __forceinline__ bool survives(const Options& options, int query, int key) {
  if constexpr (Options::kHasDropout) {
    const unsigned drawn = options.template draw<2>(query / 16 * 16, key / 32 * 32).template bits<false>();
    const unsigned of_owner = __shfl_sync(kFullMask, drawn, query % 8 * 4 + key % 8 / 2);
    return of_owner >> (key / 8 % 4 * 4 + query / 8 % 2 * 2 + key % 2) & 1;
  } else {
    return true;
  }
}

}  // namespace cuflash
