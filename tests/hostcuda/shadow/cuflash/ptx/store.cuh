// Shadows <cuflash/ptx/store.cuh>.
#pragma once

namespace cuflash::ptx {

inline void store_16(void* global, unsigned x, unsigned y, unsigned z, unsigned w,
                     hostcuda::Site site = hostcuda::Site::here()) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    hostcuda::fail("st.global at %s:%d: the address is not a multiple of 16", site.file, site.line);
  }
  *static_cast<uint4*>(global) = make_uint4(x, y, z, w);
}

}  // namespace cuflash::ptx
