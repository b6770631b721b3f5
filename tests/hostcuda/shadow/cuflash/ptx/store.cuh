// Shadows <cuflash/ptx/store.cuh>.
#pragma once

namespace cuflash::ptx {

inline void store_8(void* global, unsigned x, unsigned y, hostcuda::Site site = hostcuda::Site::here()) {
  if (reinterpret_cast<uintptr_t>(global) % 8 != 0) {
    hostcuda::fail("st.global at %s:%d: the address is not a multiple of 8", site.file, site.line);
  }
  *static_cast<uint2*>(global) = make_uint2(x, y);
}

}  // namespace cuflash::ptx
