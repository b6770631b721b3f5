// 64 rows of a product, in the registers of a warpgroup.
#pragma once

#include <cuflash/common/numbers.cuh>
#include <cuflash/ptx/opaque.cuh>

namespace cuflash {

// A lane holds pairs of neighbours: element i is in row lane / 4 + 8 (i / 2 % 2) of its warp's 16 rows, and in column
// 8 (i / 4) + 2 (lane % 4) + i % 2. Which of a lane's two rows that is, and the part of the column that lanes share:
__device__ __forceinline__ constexpr int row_of_element(int i) { return i / 2 % 2; }
__device__ __forceinline__ constexpr int col_of_element(int i) { return i / 4 * 8 + i % 2; }

// The number of a thread in its warpgroup, which nobody computes anew: in loops that would read the special register,
// which is slow.
__device__ __forceinline__ unsigned thread_of_warpgroup() {
  unsigned thread = threadIdx.x % 128;
  ptx::make_opaque(thread);
  return thread;
}

// How many elements of a row are left of a column: 2 of each 8 columns. Negative ones are as good as none.
__device__ __forceinline__ int elements_before(int col) { return (col >> 3) * 2 + min(col & 7, 2); }

// A word of bits, set from this one on: 7 of them at once become predicates.
__device__ __forceinline__ unsigned bits_from(int bit) { return bit >= 32 ? 0 : ~0u << max(bit, 0); }

template <int kCols>
struct WarpgroupTile {
  static constexpr int kNumElements = kCols / 2;

  float x[kNumElements];

  __device__ __forceinline__ float at(int i) const { return x[i]; }

  // The largest magnitude that this lane holds. Two maxima at once: one would wait for itself at every element.
  __device__ __forceinline__ float largest() const {
    float maxima[2] = {};
#pragma unroll
    for (int i = 0; i < kNumElements; ++i) maxima[i % 2] = fmaxf(maxima[i % 2], fabsf(x[i]));
    return fmaxf(maxima[0], maxima[1]);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kNumElements; ++i) x[i] = 0.0f;
  }
};

// The same rounded to 16 bits, as the first factor of another product: the registers are in the right order already.
template <class Element, int kCols>
struct WarpgroupFactor {
  static constexpr int kNumElements = kCols / 2;

  unsigned x[kCols / 16][4];

  __device__ __forceinline__ void round(const WarpgroupTile<kCols>& tile) {
#pragma unroll
    for (int i = 0; i < kCols / 4; ++i) x[i / 4][i % 4] = packed(tile.x[2 * i], tile.x[2 * i + 1]);
  }

  // What element i of the tile was rounded to.
  __device__ __forceinline__ float at(int i) const {
    const auto& pair = reinterpret_cast<const typename PairOf<Element>::Type&>(x[i / 8][i / 2 % 4]);
    return i % 2 ? __high2float(pair) : __low2float(pair);
  }

  // Elements i and i + 1, i even, become 0 where the halves of the mask are 0.
  __device__ __forceinline__ void keep(int i, unsigned mask) { x[i / 8][i / 2 % 4] &= mask; }

  static __device__ __forceinline__ unsigned packed(float low, float high) {
    alignas(4) Element pair[2];
    store_pair(pair, low, high);
    return *reinterpret_cast<const unsigned*>(pair);
  }
};

// The same of float32, 8 columns at a time: a lane's neighbours 2 t and 2 t + 1 are what the product takes for columns
// t and t + 4. That changes the order of its terms, if the rows of the other factor are taken in the same order.
// Opaque, since ptxas would mix the exponentials with the product, as rounding keeps it from doing with 16 bits.
template <int kCols>
struct WarpgroupFactor<float, kCols> {
  static constexpr int kNumElements = kCols / 2;

  unsigned x[kCols / 8][4];

  __device__ __forceinline__ void round(const WarpgroupTile<kCols>& tile) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      unsigned& word = x[i / 4][i % 2 * 2 + i / 2 % 2];
      word = __float_as_uint(tile.x[i]);
      ptx::make_opaque(word);
    }
  }

  __device__ __forceinline__ void keep(int i, unsigned mask) {
    x[i / 4][i / 2 % 2] &= static_cast<int>(mask << 16) >> 16;
    x[i / 4][i / 2 % 2 + 2] &= static_cast<int>(mask) >> 16;
  }
};

}  // namespace cuflash
