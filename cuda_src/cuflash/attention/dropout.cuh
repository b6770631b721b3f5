// Dropout: which weights survive, the same for every kernel, drawn from a counter (Salmon et al., SC 2011).
#pragma once

#include <cuflash/attention/sequence.cuh>
#include <cuflash/ptx/compare.cuh>

namespace cuflash {

// Philox4x32-7: random bits as a function of a key and a counter. Seven rounds are the fewest that pass every test of
// the paper.
struct Philox {
  static constexpr int kRounds = 7;

  // The key of the next round.
  static __device__ __forceinline__ uint2 next(uint2 key) {
    return make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
  }

  static __device__ __forceinline__ uint4 round(uint2 key, uint4 counter) {
    const unsigned high0 = __umulhi(kFactor0, counter.x), low0 = kFactor0 * counter.x;
    const unsigned high1 = __umulhi(kFactor1, counter.z), low1 = kFactor1 * counter.z;
    return make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
  }

  static __device__ __forceinline__ uint4 random(uint2 key, uint4 counter) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      counter = round(key, counter);
      key = next(key);
    }
    return counter;
  }

  static constexpr unsigned kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;
};

// Its keys of all rounds, in shared memory, for warps that draw much and have few registers.
struct alignas(16) RoundKeys {
  unsigned long long keys[Philox::kRounds];

  // By one thread.
  __device__ __forceinline__ void fill(uint2 key) {
#pragma unroll
    for (int i = 0; i < Philox::kRounds; ++i) {
      keys[i] = static_cast<unsigned long long>(key.y) << 32 | key.x;
      key = Philox::next(key);
    }
  }

  // Read anew each time.
  __device__ __forceinline__ uint2 operator[](int round) const {
    const unsigned long long key = *const_cast<const volatile unsigned long long*>(keys + round);
    return make_uint2(static_cast<unsigned>(key), static_cast<unsigned>(key >> 32));
  }
};

// Draws of a column and several rows: of their first three rounds, most is the same for all.
struct PhiloxColumn {
  const RoundKeys& keys;
  unsigned x1, x3, z2, z3, w3;  // what counters have in common after so many rounds, but for what the row adds

  __device__ __forceinline__ PhiloxColumn(const RoundKeys& keys, uint4 counter) : keys(keys) {
    const uint4 first = Philox::round(keys[0], counter);
    const uint2 second_key = keys[1], third_key = keys[2];
    x1 = first.x;
    z2 = first.w ^ second_key.y;
    const unsigned x2 = __umulhi(Philox::kFactor1, first.z) ^ first.y ^ second_key.x;
    x3 = Philox::kFactor1 * first.z ^ third_key.x;
    z3 = __umulhi(Philox::kFactor0, x2) ^ third_key.y;
    w3 = Philox::kFactor0 * x2;
  }

  // Those of kCount rows, that one with bits changed. Each is one long chain: several at once.
  template <int kCount>
  __device__ __forceinline__ void random(const unsigned (&changes)[kCount], uint4 (&counters)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const unsigned x = x1 ^ changes[i], z = __umulhi(Philox::kFactor0, x) ^ z2;
      counters[i] = make_uint4(__umulhi(Philox::kFactor1, z) ^ x3, Philox::kFactor1 * z, Philox::kFactor0 * x ^ z3, w3);
    }
#pragma unroll
    for (int round = 3; round < Philox::kRounds; ++round) {
      const uint2 key = keys[round];
#pragma unroll
      for (int i = 0; i < kCount; ++i) counters[i] = Philox::round(key, counters[i]);
    }
  }
};

// Random numbers for the pairs that a lane holds of 16 queries and 16 or 32 keys in the layout of mma instructions:
// element i is for query 8 (i / 2 % 2) + lane / 4 and key 8 (i / 4) + 2 (lane % 4) + i % 2. A word of 32 bits serves
// four of them: as the two halves of the word, and of the word rotated by 8 bits. So each number has a first byte of
// its own, which decides but for one of its 256 values, and then the first byte of another number does.
template <int kTiles>
struct Draw {
  unsigned random[2 * kTiles];
  unsigned threshold;  // twice, in float16: what instructions compare in pairs
  unsigned inverse;    // all ones if numbers below the threshold are those that do not survive, 0 if they alone do

  // Of elements i and i + 1, i even: all ones in the half of one whose number is below the threshold.
  __device__ __forceinline__ unsigned below(int i) const {
    const unsigned word = random[i / 8 * 2 + i / 2 % 2];
    return ptx::less_2(i / 4 % 2 ? __funnelshift_l(word, word, 8) : word, threshold);
  }

  // The same for one that survives.
  __device__ __forceinline__ unsigned pair(int i) const { return below(i) ^ inverse; }

  // Of all elements, a bit for each. In the transposed order bits 1 and 2 of i change places.
  template <bool kTransposed>
  __device__ __forceinline__ unsigned bits() const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8 * kTiles; i += 2) {
      const int position = kTransposed ? i / 8 * 8 + i / 4 % 2 * 2 + i / 2 % 2 * 4 : i;
      bits |= below(i) & 0x20001u << position;
    }
    return ((bits | bits >> 16) ^ inverse) & (1u << 8 * kTiles) - 1;
  }
};

struct Dropout {
  unsigned long long seed;
  const unsigned long long* seed_array;  // if not null, the seed is there
  unsigned threshold, inverse;           // as in Draw
  float survivor_factor;                 // 1 / (1 - p)
  int batch, head;                       // at hand

  __device__ __forceinline__ void enter(const Sequence& sequence, int query_head) {
    if (seed_array != nullptr) seed = *seed_array;
    batch = sequence.batch;
    head = query_head;
  }

  __device__ __forceinline__ uint2 key_of_seed() const {
    return make_uint2(static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32));
  }

  // For the tiles of 16 x 16 that begin at these multiples of 16; two of them where the key is a multiple of 32.
  template <int kTiles>
  __device__ __forceinline__ Draw<kTiles> draw(unsigned query, unsigned key) const {
    const int lane = threadIdx.x % 32;
    const unsigned first_key = kTiles == 2 ? key : key / 32 * 32;  // of those that share draws
    const unsigned column = first_key / 8 + lane % 4, row = query / 2 + lane / 4;
    const uint4 random = Philox::random(key_of_seed(), make_uint4(column, row, head, batch));
    if constexpr (kTiles == 2) {
      return {{random.x, random.y, random.z, random.w}, threshold, inverse};
    } else {
      const bool second = key / 16 % 2;
      return {{second ? random.z : random.x, second ? random.w : random.y}, threshold, inverse};
    }
  }
};

}  // namespace cuflash
