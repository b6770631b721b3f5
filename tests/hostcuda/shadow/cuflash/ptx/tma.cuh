// Shadows <cuflash/ptx/tma.cuh>: maps are plain numbers, as tests/hostcuda/device.py writes them.
#pragma once

#include <cuflash/ptx/mbarrier.cuh>

namespace cuflash::ptx {

struct alignas(64) TensorMap {
  const uint16_t* array;
  long long shape[4], strides[3], box[2];  // in elements, innermost first
  long long unused[6];
};
static_assert(sizeof(TensorMap) == 128);

// What lazy copies leave until they come: 14.6 in float16. Not NaN, since kernels compute again what that has spoiled.
constexpr int kLateByte = 0x4b;

inline void tma_prefetch(const TensorMap*) {}

// Rows of 128 bytes, whose 16-byte pieces are swizzled by the number of the row, as addresses tell it.
inline unsigned char* swizzled(unsigned char* address) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<unsigned char*>(place ^ (place / 128 % 8 * 16));
}

inline void tma_load(void* shared, const TensorMap* map, Barrier* barrier, int x0, int x1, int x2, int x3,
                     hostcuda::Site site = hostcuda::Site::here()) {
  auto* const target = static_cast<unsigned char*>(shared);
  const int cols = static_cast<int>(map->box[0]), rows = static_cast<int>(map->box[1]);
  if (reinterpret_cast<uintptr_t>(target) % 128 != 0) {
    hostcuda::fail("TMA at %s:%d: the target is not a multiple of 128", site.file, site.line);
  }
  hostcuda::check_in_shared_memory(target, "TMA", site);
  hostcuda::check_in_shared_memory(target + rows * 128 - 1, "TMA", site);
  if (hostcuda::options.lazy_copies) memset(target, kLateByte, rows * 128);
  hostcuda::by_copy_engine(barrier, [=] {
    const auto is_inside = [&](long long i, int axis) { return i >= 0 && i < map->shape[axis]; };
    for (int row = 0; row < rows; ++row) {
      const bool valid = is_inside(x1 + row, 1) && is_inside(x2, 2) && is_inside(x3, 3);
      const uint16_t* const source =
          map->array + (x1 + row) * map->strides[0] + x2 * map->strides[1] + x3 * map->strides[2];
      for (int col = 0; col < cols; ++col) {
        const uint16_t x = valid && is_inside(x0 + col, 0) ? source[x0 + col] : 0;
        memcpy(swizzled(target + row * 128 + col * 2), &x, sizeof x);
      }
    }
    barrier_complete(barrier, rows * cols * 2, site);
  });
}

inline void async_proxy_fence() {}

}  // namespace cuflash::ptx
