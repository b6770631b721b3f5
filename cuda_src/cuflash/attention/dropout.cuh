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

// One draw decides about 8 pairs, the ones that a lane holds of a 16 x 16 tile in the layout of mma instructions:
// number 4 i + 2 j + c is for query 8 i + lane / 4 and key 8 j + 2 (lane % 4) + c of the tile.
struct Draw {
  uint4 random;        // two numbers of 16 bits in each word, the low half first
  unsigned threshold;  // 65536 times the least number that survives

  // The low half is compared as a high one, and what is below a high half decides nothing.
  __device__ __forceinline__ bool survives(int i) const {
    const unsigned word = i / 2 == 0 ? random.x : i / 2 == 1 ? random.y : i / 2 == 2 ? random.z : random.w;
    return (i % 2 ? word : word << 16) >= threshold;
  }

  // The same of all numbers, a bit for each.
  __device__ __forceinline__ unsigned survivors() const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= survives(i) << i;
    return bits;
  }
};

struct Dropout {
  unsigned long long seed;
  const unsigned long long* seed_array;  // if not null, the seed is there
  unsigned threshold;                    // as in Draw
  float survivor_factor;                 // 1 / (1 - p)
  int batch, head;                       // at hand

  __device__ __forceinline__ void enter(const Sequence& sequence, int query_head) {
    if (seed_array != nullptr) seed = *seed_array;
    batch = sequence.batch;
    head = query_head;
  }

  // Of the tile that begins at these multiples of 16.
  __device__ __forceinline__ Draw draw(unsigned query, unsigned key) const {
    const int lane = threadIdx.x % 32;
    const unsigned column = key / 4 + lane % 4, row = query / 2 + lane / 4;
    // The keys of all rounds are then in registers that lanes share.
    const unsigned low = uniform(static_cast<unsigned>(seed)), high = uniform(static_cast<unsigned>(seed >> 32));
    return {philox(make_uint2(low, high), make_uint4(column, row, head, batch)), threshold};
  }
};

}  // namespace cuflash
