// Which weights of a tile survive dropout, drawn by warps that have time, ahead of those whose rows are keys.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/ptx/opaque.cuh>
#include <cuflash/ptx/permute.cuh>

namespace cuflash {

// A bit for each element that a lane holds of a warp's 16 keys, 64 queries in a word. Element i has bit 7 - i / 2 % 8
// of byte i / 16 * 2 + i % 2: one shift puts those of a pair, and of the pair 16 further, in front of their bytes.
template <int kBlockM>
struct KeptElements {
  unsigned words[ceil_div(kBlockM, 64)];

  __device__ __forceinline__ bool operator()(int i) const {
    return words[i / 32] >> (i % 32 / 16 * 16 + i % 2 * 8 + 7 - i / 2 % 8) & 1;
  }

  // The element of a bit.
  static constexpr __host__ __device__ int element(int bit) { return bit / 16 * 16 + (7 - bit % 8) * 2 + bit / 8 % 2; }

  // All ones in the half of one that survives, of elements i and i + 1, i even.
  __device__ __forceinline__ unsigned pair(int i) const {
    return ptx::permute(words[i / 32] << i / 2 % 8, 0, i % 32 < 16 ? 0x9988 : 0xbbaa);
  }
};

template <int kBlockM, int kBlockN>
struct SurvivorTile {
  static_assert(kBlockM % 64 == 0 && kBlockN % 32 == 0);

  unsigned words[kBlockN / 16][kBlockM / 64][32];
  RoundKeys keys;  // for those who draw

  // Every kNumWarps-th part of the tile, which begins at multiples of its size. A draw is one long chain: two at once.
  template <int kNumWarps>
  __device__ __forceinline__ void draw(const Dropout& dropout, int first_query, int first_key, int warp) {
    unsigned thread = threadIdx.x;
    ptx::make_opaque(thread);  // else the loops read the special register, which is slow
    const unsigned lane = thread % 32;
#pragma unroll 1
    for (int part = warp; part < kBlockN / 32 * (kBlockM / 64); part += kNumWarps) {
      const int query = part % (kBlockM / 64), key = part / (kBlockM / 64) * 2;
      const unsigned row = (first_query + 64 * query) / 2 + lane / 4;
      const unsigned column_of_lane = (first_key + 16 * key) / 8 + lane % 4;
      const PhiloxColumn column(keys, make_uint4(column_of_lane, row, dropout.head, dropout.batch));
      unsigned drawn[2] = {};  // for the first 16 of 32 keys, and for the others
      constexpr int kAtOnce = 2;
#pragma unroll 1
      for (int i = 0; i < 4; i += kAtOnce) {
        unsigned changes[kAtOnce];
        uint4 random[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) changes[j] = 8 * (i + j);
        column.random(changes, random);
#pragma unroll
        for (int half = 0; half < 2; ++half) drawn[half] <<= 4 * kAtOnce;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const Draw<2> draw = {{random[j].x, random[j].y, random[j].z, random[j].w}, dropout.threshold, 0};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
              const int bit = 4 * (kAtOnce - 1 - j) + 3 - (i / 2 % 2 * 2 + i / 4 % 2);
              drawn[half] |= draw.below(8 * half + i) & 0x10001u << bit;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) words[key + i][query][lane] = transposed(drawn[i] ^ dropout.inverse, lane);
    }
  }

  // Those of a lane, if its warp has keys from this one on.
  __device__ __forceinline__ KeptElements<kBlockM> of_keys(int first_key, int lane) const {
    KeptElements<kBlockM> kept;
#pragma unroll
    for (int i = 0; i < kBlockM / 64; ++i) kept.words[i] = words[first_key / 16][i][lane];
    return kept;
  }

 private:
  // A lane drew for one query and two neighbouring keys where another needs one key and two neighbouring queries: the
  // upper half of a word is for odd keys.
  static __device__ __forceinline__ unsigned transposed(unsigned drawn, unsigned lane) {
    const int key = lane / 4, query = lane % 4 * 2;
    const unsigned even = __shfl_sync(kFullMask, drawn, query * 4 + key / 2);
    const unsigned odd = __shfl_sync(kFullMask, drawn, query * 4 + 4 + key / 2);
    return ptx::permute(even, odd, key % 2 ? 0x6273 : 0x4051);
  }
};

}  // namespace cuflash
