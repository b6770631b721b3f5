// A tile in shared memory as TMA writes it and wgmma reads it.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/ptx/cluster.cuh>
#include <cuflash/ptx/stmatrix.cuh>
#include <cuflash/ptx/tma.cuh>
#include <cuflash/ptx/wgmma.cuh>
#include <cuflash/tile/matrix.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// Panels of 64 columns, each with rows of 128 bytes; the 16-byte pieces of 8 rows are swizzled against bank conflicts.
template <class Element, int kRows, int kCols>
struct alignas(1024) SwizzledTile {
  static constexpr int kPanelCols = 128 / sizeof(Element);
  static constexpr int kPanels = ceil_div(kCols, kPanelCols);
  static constexpr int kBytes = kPanels * kRows * 128;

  unsigned char data[kBytes];

  // Starts to fill the tile with rows of an array of (batch, heads, rows, columns), from a row and a column on; the
  // barrier counts the bytes. The map has one entry along an axis of which the array has the stride 0. All blocks of a
  // cluster of kCluster get it.
  template <int kCluster = 1>
  __device__ __forceinline__ void load(const ptx::TensorMap* map, ptx::Barrier* barrier, const Strides& strides,
                                       int batch, int head, int first_row, int first_col = 0) {
    const int mapped_batch = strides.batch == 0 ? 0 : batch, mapped_head = strides.head == 0 ? 0 : head;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      void* const target = data + panel * kRows * 128;
      const int col = first_col + panel * kPanelCols;
      if constexpr (kCluster > 1) {
        ptx::tma_load_to_all(target, map, barrier, col, first_row, mapped_head, mapped_batch, (1 << kCluster) - 1);
      } else {
        ptx::tma_load(target, map, barrier, col, first_row, mapped_head, mapped_batch);
      }
    }
  }

  // Writes zeros to rows [first, end), by a warp.
  __device__ __forceinline__ void clear(int first, int end) {
    for (int panel = 0; panel < kPanels; ++panel) {
      for (int byte = first * 128 + threadIdx.x % 32 * 16; byte < end * 128; byte += 32 * 16) {
        *reinterpret_cast<uint4*>(data + panel * kRows * 128 + byte) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Writes 16 rows from this one on, by the warp that holds them.
  __device__ __forceinline__ void store(const WarpgroupFactor<Element, kCols>& rows, int first_row, int lane) {
    const int row = first_row + lane % 16;
#pragma unroll
    for (int i = 0; i < kCols / 16; ++i) ptx::stmatrix(piece(row, 16 * i + lane / 16 * 8), rows.x[i]);
  }

  // As a factor whose depth runs along the columns: 16 of them from this place.
  __device__ __forceinline__ ptx::TileDescriptor along(int row, int col) const { return descriptor(row, col, 16); }

  // As a factor whose depth runs across the rows: 16 of them from this one, and columns from this multiple of 32.
  __device__ __forceinline__ ptx::TileDescriptor across(int row, int col = 0) const {
    return descriptor(row, col, kRows * 128);
  }

  // Where the 16-byte piece that begins at a row and a column is.
  __device__ __forceinline__ void* piece(int row, int col) {
    return data + (col / kPanelCols * kRows + row) * 128 + (col % kPanelCols * sizeof(Element) ^ row % 8 * 16);
  }

 private:
  // 8 rows further are 1024 bytes; 1 << 30 in the upper word is the 128-byte swizzle. The place is added last: where
  // it is a constant, each descriptor is one addition to that of the tile.
  __device__ __forceinline__ ptx::TileDescriptor descriptor(int row, int col, int leading_bytes) const {
    const unsigned tile = ptx::shared_address(data) / 16 + (leading_bytes / 16 << 16);
    const unsigned place = (col / kPanelCols * kRows + row) * 128 + col % kPanelCols * sizeof(Element);
    return static_cast<ptx::TileDescriptor>(1u << 30 | 1024 / 16) << 32 | (tile + place / 16);
  }
};

}  // namespace cuflash
