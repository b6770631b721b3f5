// Shadows <cuflash/ptx/mma.cuh>: which lane holds what is as the PTX ISA draws it.
#pragma once

#include <cuflash/common/numbers.cuh>

namespace cuflash::ptx {

// Tensor cores keep products exact and round (or cut off) their sum once: so in double.
template <class Element>
inline void mma(float* sum, const unsigned (&a)[4], unsigned b0, unsigned b1,
                hostcuda::Site site = hostcuda::Site::here()) {
  struct Argument {
    float* sum;
    unsigned a[4], b[2];
  } argument = {sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto half_of = [](unsigned pair, int i) {
    return hostcuda::to_float(hostcuda::bits_as<Element>(static_cast<uint16_t>(pair >> 16 * i)));
  };
  hostcuda::warp_operation(hostcuda::kAllLanes, "mma", site, argument, [&](const hostcuda::Lanes<Argument>& lanes) {
    if (!lanes.all_present()) {
      hostcuda::fail("mma at %s:%d: some lanes of the warp have exited", site.file, site.line);
    }
    float factor_a[16][16], factor_b[16][8];
    double sums[16][8];
    lanes.for_each([&](int lane, const Argument& mine) {
      const int row = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i)
        factor_a[row + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] = half_of(mine.a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) factor_b[pair + i / 2 * 8 + i % 2][row] = half_of(mine.b[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) sums[row + i / 2 * 8][pair + i % 2] = mine.sum[i];
    });
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sums[i][j] += double(factor_a[i][k]) * factor_b[k][j];
      }
    }
    lanes.for_each([&](int lane, Argument& mine) {
      for (int i = 0; i < 4; ++i) mine.sum[i] = float(sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    });
  });
}

}  // namespace cuflash::ptx
