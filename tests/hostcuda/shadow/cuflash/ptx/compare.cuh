// Shadows <cuflash/ptx/compare.cuh>.
#pragma once

namespace cuflash::ptx {

inline unsigned less_2(unsigned x, unsigned y) {
  const auto is_less = [&](int half) {
    const auto number = [&](unsigned word) {
      return hostcuda::to_float(hostcuda::bits_as<__half>(static_cast<uint16_t>(word >> 16 * half)));
    };
    return number(x) < number(y);
  };
  return (is_less(0) ? 0xffffu : 0u) | (is_less(1) ? 0xffff0000u : 0u);
}

}  // namespace cuflash::ptx
