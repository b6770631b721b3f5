// Shadows <cuflash/ptx/load_shared.cuh>.
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

inline unsigned load_shared(SharedAddress address, hostcuda::Site site = hostcuda::Site::here()) {
  const auto* const word = reinterpret_cast<const unsigned*>(address);
  hostcuda::check_in_shared_memory(word, "ld.shared", site);
  return *word;
}

}  // namespace cuflash::ptx
