// Shadows <cuflash/ptx/stmatrix.cuh>: which lane stores what is as the PTX ISA draws it.
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

// Each lane learns the rows of all, and then stores its own elements itself, so that sanitizers see who writes what.
inline void stmatrix(void* shared, const unsigned (&x)[4], hostcuda::Site site = hostcuda::Site::here()) {
  if (shared_address(shared) % 16 != 0) {
    hostcuda::fail("stmatrix at %s:%d: the address is not a multiple of 16", site.file, site.line);
  }
  hostcuda::check_in_shared_memory(shared, "stmatrix", site);
  const int lane = hostcuda::current->lane;
  for (int i = 0; i < 4; ++i) {
    const auto row = hostcuda::shuffle(hostcuda::kAllLanes, "stmatrix", site, shared, 8 * i + lane / 4);
    static_cast<unsigned*>(row)[lane % 4] = x[i];
  }
}

}  // namespace cuflash::ptx
