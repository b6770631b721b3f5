// Shadows <cuflash/ptx/bulk_add.cuh>: lazy additions read shared memory when the thread waits for that.
#pragma once

namespace cuflash::ptx {

inline void bulk_add(float4* global, const void* shared, int num_bytes, hostcuda::Site site = hostcuda::Site::here()) {
  const auto is_misaligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16; };
  if (is_misaligned(global) || is_misaligned(shared) || num_bytes % 16 != 0) {
    hostcuda::fail("cp.reduce at %s:%d: not multiples of 16 bytes", site.file, site.line);
  }
  hostcuda::check_in_shared_memory(shared, "cp.reduce", site);
  hostcuda::by_copy_engine(hostcuda::current, [=] {
    for (int i = 0; i < num_bytes / 4; ++i) {
      atomicAdd(reinterpret_cast<float*>(global) + i, static_cast<const float*>(shared)[i]);
    }
  });
}

inline void bulk_add_wait_read() { hostcuda::finish_copies(hostcuda::current); }

}  // namespace cuflash::ptx
