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

inline void add_16(float4* global, float x, float y, float z, float w, hostcuda::Site site = hostcuda::Site::here()) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    hostcuda::fail("red.global at %s:%d: the address is not a multiple of 16", site.file, site.line);
  }
  atomicAdd(&global->x, x);
  atomicAdd(&global->y, y);
  atomicAdd(&global->z, z);
  atomicAdd(&global->w, w);
}

}  // namespace cuflash::ptx
