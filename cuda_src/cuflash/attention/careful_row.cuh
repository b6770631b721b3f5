// A row of the output once more, from global memory, in which hidden pairs take no part even if their values are NaN or
// infinity. A product on tensor cores gives hidden pairs the weight 0, but 0 * NaN is NaN. Slow: for the rare row that
// meets such a value.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/register_softmax.cuh>
#include <cuflash/attention/survivors.cuh>

namespace cuflash {

// What a warp needs to know of its head.
template <class Element, class Options, class Result = Element>
struct CarefulHead {
  using Softmax = RowSoftmax<Element, Options>;

  // What a warp needs for the pairs of one row.
  struct alignas(16) Memory {
    unsigned char pairs[larger(Options::template kTileBytes<1, 32>, 16)];
  };

  const Matrix<const Element>&q, &k, &v;
  const Matrix<Result>& out;
  const Options& options;
  const Band& band;
  Range keys;  // that count: all, or a part of them
  float scale;
  Memory& memory;  // of this warp

  // Writes out[row], whose weights are multiplied by inverse.
  template <int kHeadDimV>
  __device__ __forceinline__ void write_row(int row, Softmax softmax, float inverse) const {
    const int lane = threadIdx.x % 32;
    float sum[kHeadDimV / 32] = {};
    const Range in_band = band.keys_of({row, row + 1});
    const int begin = max(keys.begin, in_band.begin), end = min(keys.end, in_band.end);
#pragma unroll 1
    for (int first_key = begin / 32 * 32; first_key < end; first_key += 32) {
      Options here = options;
      here.template load<1, 32, 32>(memory.pairs, row, first_key, lane);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncwarp();
      here.template look_at<1, 32>(memory.pairs, row, first_key);
      const Pairs<Options> pairs = {here, band, scale};

      const int key = first_key + lane;
      const bool visible = begin <= key && key < end && pairs.visible(row, key);
      float weight = 0.0f;
      if (visible) {
        float product = 0.0f;
#pragma unroll 1
        for (int col = 0; col < q.cols; ++col) product += to_float(*q.at(row, col)) * to_float(*k.at(key, col));
        // Rounded as for the tensor cores.
        weight = to_float(from_float<Element>(softmax.weight(pairs.score(product, row, key).value * Softmax::kUnit)));
      }
      if (!survives(here, row, key)) weight = 0.0f;

      const unsigned all_visible = __ballot_sync(kFullMask, visible);
#pragma unroll 1
      for (int other = 0; other < 32; ++other) {
        const float factor = __shfl_sync(kFullMask, weight, other);
        if (!(all_visible >> other & 1)) continue;
#pragma unroll
        for (int i = 0; i < kHeadDimV / 32; ++i) {
          const int col = 32 * i + lane;
          if (col < v.cols) sum[i] += factor * to_float(*v.at(first_key + other, col));
        }
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kHeadDimV / 32; ++i) {
      const int col = 32 * i + lane;
      if (col < out.cols) *out.at(row, col) = from_float<Result>(sum[i] * inverse);
    }
  }

  // Writes the 16 rows of a warp from this one, of which lanes 4 r hold the numbers for rows r and r + 8.
  template <int kHeadDimV>
  __device__ __forceinline__ void write_rows(int first_row, const float (&base)[2], const float (&inverse)[2]) const {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const bool second = i >= 8;
      const int row = first_row + i, lane = i % 8 * 4;
      const float row_base = __shfl_sync(kFullMask, second ? base[1] : base[0], lane);
      const float row_inverse = __shfl_sync(kFullMask, second ? inverse[1] : inverse[0], lane);
      if (row < out.rows) write_row<kHeadDimV>(row, {row_base}, row_inverse);
    }
  }
};

}  // namespace cuflash
