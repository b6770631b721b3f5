// The end of a forward whose keys were shared out: the online softmax once more, over parts instead of keys. Of each it
// has a base and a sum, since the lse of large scores would have lost the sum.
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/attention/softmax.cuh>

namespace cuflash {

// A thread has 4 neighbours of a row, and those of parts are filled up to so many. Parts are there as if they were
// heads: part p of head h is p * num_heads + h.
template <class Number, int kNumWarps>
struct MergeParts {
  using Element = typename Number::Element;
  using Parts = Matrix<const float>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = 0;
  static constexpr int kCols = Parts::kVector;

  struct Arrays {
    const float *parts, *part_sums;
    Element* out;
    float* lse;  // may be null
  };

  // Rows know no sequences here: packed arrays count as one.
  static __device__ __forceinline__ void run(const Arrays& arrays, const MergeParams& params) {
    const Problem& problem = params.problem;
    const int index = blockIdx.x * kNumThreads + threadIdx.x, threads_in_row = ceil_div(problem.head_dim_v, kCols);
    const int col = index % threads_in_row * kCols, numbered = index / threads_in_row;
    if (numbered >= params.num_rows) return;
    const int row = numbered % problem.seqlen_q, head = numbered / problem.seqlen_q % problem.num_heads;
    const int batch = numbered / problem.seqlen_q / problem.num_heads;
    const Parts parts(arrays.parts, params.parts, batch, head, row);
    const Parts part_sums(arrays.part_sums, params.part_sums, batch, head, row);

    OnlineSoftmax<> softmax;
    float sum = 0.0f, acc[kCols] = {};
#pragma unroll 4  // so many are loaded at once
    for (int part = 0; part < params.num_parts; ++part) {
      const int first_head = part * problem.num_heads;
      const float4 loaded = *reinterpret_cast<const float4*>(parts.at(0, col) + first_head * params.parts.head);
      const float x[kCols] = {loaded.x, loaded.y, loaded.z, loaded.w};
      const float2 of_part = *reinterpret_cast<const float2*>(part_sums.at(0, 0) + first_head * params.part_sums.head);
      const float factor = softmax.rescale(of_part.x), weight = softmax.weight(of_part.x) * of_part.y;
      sum = sum * factor + weight;
#pragma unroll
      for (int i = 0; i < kCols; ++i) acc[i] = acc[i] * factor + weight * x[i];
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const Matrix<Element> out(arrays.out, params.out, batch, head, row, 1, problem.head_dim_v);
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      if (col + i < out.cols) *out.at(0, col + i) = from_float<Element>(acc[i] * inverse);
    }
    if (arrays.lse != nullptr && col == 0) {
      *Matrix<float>(arrays.lse, params.lse, batch, head, row).at(0, 0) = softmax.lse(sum);
    }
  }
};

}  // namespace cuflash
