// Shadows <cuflash/ptx/store.cuh>.
#pragma once

namespace cuflash::ptx {

template <int kWords>
inline void store(void* global, const unsigned (&x)[kWords], hostcuda::Site site = hostcuda::Site::here()) {
  if (reinterpret_cast<uintptr_t>(global) % sizeof(x) != 0) {
    hostcuda::fail("st.global at %s:%d: the address is not a multiple of %d", site.file, site.line,
                   static_cast<int>(sizeof(x)));
  }
  for (int i = 0; i < kWords; ++i) static_cast<unsigned*>(global)[i] = x[i];
}

}  // namespace cuflash::ptx
