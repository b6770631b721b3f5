// The end of a forward whose keys were shared out: the online softmax once more, over parts instead of keys.
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/attention/softmax.cuh>

namespace cuflash {

// A thread has one number of the output. Parts of a head are there as heads: part p of head h is head p * num_heads +
// h.
template <class Number, int kNumWarps>
struct MergeParts {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = 0;

  struct Arrays {
    const float *parts, *part_lse;
    Element* out;
    float* lse;  // may be null
  };

  // Rows know no sequences here: packed arrays count as one.
  static __device__ __forceinline__ void run(const Arrays& arrays, const MergeParams& params) {
    const Problem& problem = params.problem;
    const int index = blockIdx.x * kNumThreads + threadIdx.x;
    const int col = index % problem.head_dim_v, numbered = index / problem.head_dim_v;
    if (numbered >= params.num_rows) return;
    const int row = numbered % problem.seqlen_q, head = numbered / problem.seqlen_q % problem.num_heads;
    const int batch = numbered / problem.seqlen_q / problem.num_heads;

    OnlineSoftmax softmax;
    float sum = 0.0f, acc = 0.0f;
#pragma unroll 4  // so many are loaded at once
    for (int part = 0; part < params.num_parts; ++part) {
      const int head_in = part * problem.num_heads + head;
      const float lse = *Matrix<const float>(arrays.part_lse, params.part_lse, batch, head_in, row).at(0, 0);
      const float out = *Matrix<const float>(arrays.parts, params.parts, batch, head_in, row).at(0, col);
      const float factor = softmax.rescale(lse), weight = softmax_weight(lse, softmax.shift());
      sum = sum * factor + weight;
      acc = acc * factor + weight * out;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    *Matrix<Element>(arrays.out, params.out, batch, head, row).at(0, col) = from_float<Element>(acc * inverse);
    if (arrays.lse != nullptr && col == 0) {
      *Matrix<float>(arrays.lse, params.lse, batch, head, row).at(0, 0) = softmax.lse(sum);
    }
  }
};

}  // namespace cuflash
