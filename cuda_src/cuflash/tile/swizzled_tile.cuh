// A tile in shared memory as TMA writes it and wgmma reads it.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/ptx/tma.cuh>
#include <cuflash/ptx/wgmma.cuh>

namespace cuflash {

// Panels of 64 columns, each with rows of 128 bytes; the 16-byte pieces of 8 rows are swizzled against bank conflicts.
template <class Element, int kRows, int kCols>
struct alignas(1024) SwizzledTile {
  static constexpr int kPanelCols = 128 / sizeof(Element);
  static constexpr int kPanels = ceil_div(kCols, kPanelCols);
  static constexpr int kBytes = kPanels * kRows * 128;

  unsigned char data[kBytes];

  // Starts to fill the tile with rows of a tensor of (batch, heads, rows, columns); the barrier counts the bytes.
  __device__ __forceinline__ void load(const ptx::TensorMap* map, ptx::Barrier* barrier, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::tma_load(data + panel * kRows * 128, map, barrier, panel * kPanelCols, row, head, batch);
    }
  }

  // Writes zeros to all rows from this one, by a warp.
  __device__ __forceinline__ void clear_from(int row) {
    for (int panel = 0; panel < kPanels; ++panel) {
      for (int byte = row * 128 + threadIdx.x % 32 * 16; byte < kRows * 128; byte += 32 * 16) {
        *reinterpret_cast<uint4*>(data + panel * kRows * 128 + byte) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // As a factor whose depth runs along the columns: 16 of them from this place.
  __device__ __forceinline__ ptx::TileDescriptor along(int row, int col) const {
    return descriptor(data + (col / kPanelCols * kRows + row) * 128 + col % kPanelCols * sizeof(Element), 16);
  }

  // As a factor whose depth runs across the rows: 16 of them from this one, and all columns.
  __device__ __forceinline__ ptx::TileDescriptor across(int row) const {
    return descriptor(data + row * 128, kRows * 128);
  }

 private:
  // 8 rows further are 1024 bytes; 1 << 62 is the 128-byte swizzle.
  static __device__ __forceinline__ ptx::TileDescriptor descriptor(const unsigned char* start, int leading_bytes) {
    return static_cast<ptx::TileDescriptor>((ptx::shared_address(start) & 0x3FFFF) >> 4) |
           static_cast<ptx::TileDescriptor>(leading_bytes >> 4) << 16 |
           static_cast<ptx::TileDescriptor>(1024 >> 4) << 32 | static_cast<ptx::TileDescriptor>(1) << 62;
  }
};

}  // namespace cuflash
