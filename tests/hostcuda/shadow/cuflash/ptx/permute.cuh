// Shadows <cuflash/ptx/permute.cuh>.
#pragma once

namespace cuflash::ptx {

inline unsigned permute(unsigned x, unsigned y, unsigned selector) {
  unsigned bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> 4 * i & 15;
    const unsigned byte = (digit % 8 < 4 ? x : y) >> digit % 4 * 8 & 0xff;
    bytes |= (digit < 8 ? byte : byte >> 7 ? 0xffu : 0u) << 8 * i;
  }
  return bytes;
}

}  // namespace cuflash::ptx
