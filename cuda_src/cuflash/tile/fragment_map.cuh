// Which elements of a 16 x 16 accumulator a lane holds.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/ptx/opaque.cuh>
#include <cuflash/tile/warp_tile.cuh>

namespace cuflash {

// CUDA does not say where an accumulator keeps its elements. So ask the hardware: load a tile of indices.
template <class Number>
struct FragmentMap {
  static constexpr int kNumElements = Accumulator<Number>::num_elements;
  static constexpr int kPitch = 24;  // floats; keeps stores and loads of a tile free of bank conflicts
  static constexpr int kScratchFloats = 16 * kPitch;

  unsigned positions[kNumElements / 4];  // 16 row + col of each element, in a byte
  bool paired;  // elements 2i and 2i + 1 of every lane are neighbours in a row, and 2i is in an even column

  __device__ __forceinline__ explicit FragmentMap(float* scratch) {
    const int lane = threadIdx.x % 32;
    for (int index = lane; index < 256; index += 32) {
      scratch[index / 16 * kPitch + index % 16] = static_cast<float>(index);
    }
    __syncwarp();
    Accumulator<Number> indices;
    wmma::load_matrix_sync(indices, scratch, kPitch, wmma::mem_row_major);
    __syncwarp();
#pragma unroll
    for (int word = 0; word < kNumElements / 4; ++word) positions[word] = 0;
    bool neighbours = true;
#pragma unroll
    for (int i = 0; i < kNumElements; ++i) {
      positions[i / 4] |= static_cast<unsigned>(indices.x[i]) << 8 * (i % 4);
      neighbours = neighbours && indices.x[i] == indices.x[i / 2 * 2] + i % 2 && col(i / 2 * 2) % 2 == 0;
    }
    paired = __all_sync(kFullMask, neighbours);
  }

  // Call this once in each round of a loop: unpacking a position is cheaper than keeping all of them in registers.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (int word = 0; word < kNumElements / 4; ++word) ptx::make_opaque(positions[word]);
  }

  __device__ __forceinline__ int row(int i) const { return positions[i / 4] >> (8 * (i % 4) + 4) & 15; }
  __device__ __forceinline__ int col(int i) const { return positions[i / 4] >> 8 * (i % 4) & 15; }

  // Writes accumulators, rounded to the element type, to shared memory.
  template <int kTilesM, int kTilesN>
  __device__ __forceinline__ void store(typename Number::Element* target, int pitch,
                                        const WarpTile<Number, kTilesM, kTilesN>& source) const {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        typename Number::Element* const corner = target + 16 * m * pitch + 16 * n;
        const auto& x = source.tile[m][n].x;
        if (paired) {
#pragma unroll
          for (int i = 0; i < kNumElements; i += 2) store_pair(corner + row(i) * pitch + col(i), x[i], x[i + 1]);
        } else {
#pragma unroll
          for (int i = 0; i < kNumElements; ++i) {
            corner[row(i) * pitch + col(i)] = from_float<typename Number::Element>(x[i]);
          }
        }
      }
    }
  }

  // Reduces each row of an accumulator with an associative operation; lanes 2r and 2r + 1 get the result of row r.
  template <class Operation>
  __device__ __forceinline__ float reduce_rows(const Accumulator<Number>& source, float* scratch,
                                               Operation operation) const {
    wmma::store_matrix_sync(scratch, source, kPitch, wmma::mem_row_major);
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const float4* const half_row = reinterpret_cast<const float4*>(scratch + lane / 2 * kPitch + lane % 2 * 4);
    const float4 a = half_row[0], b = half_row[2];
    __syncwarp();
    const float result = operation(operation(operation(a.x, a.y), operation(a.z, a.w)),
                                   operation(operation(b.x, b.y), operation(b.z, b.w)));
    return operation(result, __shfl_xor_sync(kFullMask, result, 1));
  }

  // The value that lanes 2r and 2r + 1 hold for row r, where r is the row of element i.
  __device__ __forceinline__ float of_row(float value, int i) const {
    return __shfl_sync(kFullMask, value, 2 * row(i));
  }
};

}  // namespace cuflash
