// Which blocks of 128 queries and 128 keys hold pairs that see each other: the others are not worth a visit.
#pragma once

#include <cuflash/attention/sequence.cuh>

namespace cuflash {

struct BlockMask {
  static constexpr int kBlock = 128;

  // One bit for each block: whether some pair, and whether every pair, is visible. A row of blocks is num_words words.
  const unsigned *some, *every;
  long long batch_stride, head_stride, num_words;  // in words
  bool some_visible, every_visible;                // of the block in which the tile at hand lies

  __device__ __forceinline__ void enter(const Sequence& sequence, int head) {
    some += sequence.batch * batch_stride + head * head_stride;
    every += sequence.batch * batch_stride + head * head_stride;
  }

  template <int kBlockM, int kBlockN>
  __device__ __forceinline__ void look_at(int first_query, int first_key) {
    static_assert(kBlock % kBlockM == 0 && kBlock % kBlockN == 0, "a tile lies in one block");
    const int row = first_query / kBlock, col = first_key / kBlock;
    const long long word = row * num_words + col / 32;
    some_visible = some[word] >> col % 32 & 1;
    every_visible = every[word] >> col % 32 & 1;
  }
};

}  // namespace cuflash
