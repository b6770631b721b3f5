// A row of a gradient once more, from global memory, in which hidden pairs take no part even if the other side of them
// holds NaN or infinity (see attention/careful_row.cuh). Slow: for the rare row that meets such a number.
#pragma once

#include <cuflash/attention/recompute.cuh>

namespace cuflash {

// What a warp needs to know of a query head.
template <class Element, class Options>
struct CarefulGradient {
  // What a warp needs for 32 pairs.
  struct alignas(16) Memory {
    unsigned char pairs[larger(larger(Options::template kTileBytes<1, 32>, Options::template kTileBytes<32, 16>), 16)];
  };

  const Matrix<const Element>&q, &k, &v, &dout;
  const Options& options;
  const Band& band;
  float scale;
  const RowStatistics& rows;
  Memory& memory;  // of this warp

  // What lanes sum up of a row of a gradient: columns lane, lane + 32, ...
  template <int kCols>
  struct Row {
    float sum[kCols / 32] = {};

    __device__ __forceinline__ void add(float factor, const Matrix<const Element>& source, int row) {
#pragma unroll
      for (int i = 0; i < kCols / 32; ++i) {
        const int col = 32 * i + threadIdx.x % 32;
        if (col < source.cols) sum[i] += factor * to_float(*source.at(row, col));
      }
    }

    __device__ __forceinline__ void write(const Matrix<Element>& target, int row, float factor) const {
#pragma unroll
      for (int i = 0; i < kCols / 32; ++i) {
        const int col = 32 * i + threadIdx.x % 32;
        if (col < target.cols) *target.at(row, col) = from_float<Element>(sum[i] * factor);
      }
    }
  };

  // Adds up the gradient of a query.
  template <int kCols>
  __device__ __forceinline__ void add_query(Row<kCols>& dq, int query) const {
    const Range keys = band.keys_of({query, query + 1});
#pragma unroll 1
    for (int first = keys.begin / 32 * 32; first < keys.end; first += 32) {
      const PairGradient mine = gradient<1, 32>(query, first, query, first + threadIdx.x % 32);
      for_each_visible(mine, [&](int other, float, float dscore) { dq.add(dscore, k, first + other); });
    }
  }

  // Adds up those of a key and a value, as far as this head goes.
  template <int kCols, int kColsV>
  __device__ __forceinline__ void add_key(Row<kCols>& dk, Row<kColsV>& dv, int key) const {
    const Range queries = band.queries_of({key, key + 1});
#pragma unroll 1
    for (int first = queries.begin / 32 * 32; first < queries.end; first += 32) {
      const PairGradient mine = gradient<32, 16>(first, key / 16 * 16, first + threadIdx.x % 32, key);
      for_each_visible(mine, [&](int other, float weight, float dscore) {
        dv.add(weight, dout, first + other);
        dk.add(dscore, q, first + other);
      });
    }
  }

 private:
  static constexpr float kHidden = -1.0f;  // no weight is negative

  // Of this lane's pair, which lies in the tile of pairs that begins there; the weight is kHidden if it does.
  template <int kRows, int kCols>
  __device__ __forceinline__ PairGradient gradient(int tile_query, int tile_key, int query, int key) const {
    Options here = options;
    __syncwarp();
    here.template load<kRows, kCols, 32>(memory.pairs, tile_query, tile_key, threadIdx.x % 32);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    here.template look_at<kRows, kCols>(memory.pairs, tile_query, tile_key);
    const Pairs<Options> pairs = {here, band, scale};
    const bool survives = this->survives(here, query, key);
    if (query >= band.seqlen_q || !pairs.visible(query, key)) return {kHidden, 0.0f};
    float product = 0.0f, dweight = 0.0f;
#pragma unroll 1
    for (int col = 0; col < q.cols; ++col) product += to_float(*q.at(query, col)) * to_float(*k.at(key, col));
#pragma unroll 1
    for (int col = 0; col < v.cols; ++col) dweight += to_float(*dout.at(query, col)) * to_float(*v.at(key, col));
    return pair_gradient(pairs, product, dweight, rows.lse_of(query), rows.delta_of(query), query, key, survives);
  }

  // Calls use(lane, weight, dscore) for the pairs of all lanes that are visible, rounded as for the tensor cores.
  template <class Use>
  static __device__ __forceinline__ void for_each_visible(const PairGradient& mine, Use use) {
    const unsigned visible = __ballot_sync(kFullMask, mine.weight != kHidden);
#pragma unroll 1
    for (int other = 0; other < 32; ++other) {
      const float weight = __shfl_sync(kFullMask, mine.weight, other);
      const float dscore = __shfl_sync(kFullMask, mine.dscore, other);
      if (visible >> other & 1)
        use(other, to_float(from_float<Element>(weight)), to_float(from_float<Element>(dscore)));
    }
  }

  // The pairs of a warp lie in two 16 x 16 tiles, of which each lane draws 8 bits (attention/dropout.cuh).
  static __device__ __forceinline__ bool survives(const Options& options, int query, int key) {
    if constexpr (Options::kHasDropout) {
      const int owner = query % 8 * 4 + key % 8 / 2, bit = query / 8 % 2 * 4 + key / 8 % 2 * 2 + key % 2;
      bool result = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int tile_query = __shfl_sync(kFullMask, query, 16 * half) / 16 * 16;
        const int tile_key = __shfl_sync(kFullMask, key, 16 * half) / 16 * 16;
        const unsigned drawn = __shfl_sync(kFullMask, options.draw(tile_query, tile_key), owner);
        if (static_cast<int>(threadIdx.x % 32 / 16) == half) result = drawn >> bit & 1;
      }
      return result;
    } else {
      return true;
    }
  }
};

}  // namespace cuflash
