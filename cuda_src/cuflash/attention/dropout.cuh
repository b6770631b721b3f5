// Dropout: which weights survive, the same for every kernel, drawn from a counter (Salmon et al., SC 2011).
#pragma once

#include <cuflash/attention/sequence.cuh>

namespace cuflash {

// Philox4x32-7: random bits as a function of a key and a counter. Seven rounds are the fewest that pass every test of
// the paper.
__device__ __forceinline__ uint4 philox(uint2 key, uint4 counter) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// One draw decides about 8 pairs, the ones that a lane holds of a 16 x 16 tile in the layout of mma instructions: bit
// 4 i + 2 j + c is for query 8 i + lane / 4 and key 8 j + 2 (lane % 4) + c of the tile.
struct Dropout {
  unsigned long long seed;
  const unsigned long long* seed_array;  // if not null, the seed is there
  unsigned threshold;                    // of 65536 numbers, how many drop
  float survivor_factor;                 // 1 / (1 - p)
  int batch, head;                       // at hand

  __device__ __forceinline__ void enter(const Sequence& sequence, int query_head) {
    if (seed_array != nullptr) seed = *seed_array;
    batch = sequence.batch;
    head = query_head;
  }

  // The bits of the tile that begins at these multiples of 16, as far as this lane draws them.
  __device__ __forceinline__ unsigned draw(int query, int key) const {
    const int lane = threadIdx.x % 32;
    const unsigned column = key / 4 + lane % 4, row = query / 2 + lane / 4;
    const uint4 random = philox(make_uint2(static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)),
                                make_uint4(column, row, head, batch));
    return survivors(random.x) | survivors(random.y) << 2 | survivors(random.z) << 4 | survivors(random.w) << 6;
  }

 private:
  __device__ __forceinline__ unsigned survivors(unsigned random) const {
    return (random & 0xffffu) >= threshold | (random >> 16 >= threshold) << 1;
  }
};

}  // namespace cuflash
