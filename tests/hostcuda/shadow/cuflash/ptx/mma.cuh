// Shadows <cuflash/ptx/mma.cuh>: which lane holds what is as the PTX ISA draws it.
#pragma once

#include <cuflash/common/numbers.cuh>

namespace cuflash::ptx {

// The elements of a word: two, or one float, of which the tensor core does not see the low bits.
template <class Element>
inline float element_of(unsigned word, int i) {
  if constexpr (sizeof(Element) == 4) {
    return hostcuda::truncate_to_tf32(hostcuda::bits_as<float>(word));
  } else {
    return hostcuda::to_float(hostcuda::bits_as<Element>(static_cast<uint16_t>(word >> 16 * i)));
  }
}

// Tensor cores keep products exact and round (or cut off) their sum once: so in double.
template <class Element>
inline void mma(float* sum, const unsigned (&a)[4], unsigned b0, unsigned b1,
                hostcuda::Site site = hostcuda::Site::here()) {
  struct Argument {
    float* sum;
    unsigned a[4], b[2];
  } argument = {sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  constexpr int kInWord = 4 / sizeof(Element), kDepth = 8 * kInWord;
  hostcuda::warp_operation(hostcuda::kAllLanes, "mma", site, argument, [&](const hostcuda::Lanes<Argument>& lanes) {
    if (!lanes.all_present()) {
      hostcuda::fail("mma at %s:%d: some lanes of the warp have exited", site.file, site.line);
    }
    float factor_a[16][kDepth], factor_b[kDepth][8];
    double sums[16][8];
    lanes.for_each([&](int lane, const Argument& mine) {
      const int row = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < kInWord; ++i) {
        const int k = lane % 4 * kInWord + i;
        for (int j = 0; j < 4; ++j) {
          factor_a[row + j % 2 * 8][k + j / 2 * kDepth / 2] = element_of<Element>(mine.a[j], i);
        }
        for (int j = 0; j < 2; ++j) factor_b[k + j * kDepth / 2][row] = element_of<Element>(mine.b[j], i);
      }
      for (int i = 0; i < 4; ++i) sums[row + i / 2 * 8][pair + i % 2] = mine.sum[i];
    });
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < 8; ++j) sums[i][j] += double(factor_a[i][k]) * factor_b[k][j];
      }
    }
    lanes.for_each([&](int lane, Argument& mine) {
      for (int i = 0; i < 4; ++i) mine.sum[i] = float(sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    });
  });
}

}  // namespace cuflash::ptx
