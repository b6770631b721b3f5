// The gradient of the attention sinks: of each head, -sum over its rows of e^(sink - lse) * delta.
#pragma once

#include <cuflash/attention/recompute.cuh>
#include <cuflash/common/shared_memory.cuh>

namespace cuflash {

// A block sums up one head, in an order that is the same in every run.
template <class Options, class Target, int kNumWarps>
struct BwdSinks {
  using Element = Target;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kSharedBytes = kNumThreads * sizeof(float);

  struct Arrays {
    const float *lse, *delta;
    Element* dsinks;  // (num_heads), contiguous
  };

  // Rows know no sequences here: packed arrays count as one.
  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, Options options) {
    const Problem& problem = params.problem;
    const int head = blockIdx.x, num_batches = Options::kPacked ? 1 : problem.batch;
    options.enter(BatchedSequences::sequence(problem, 0), head);
    float sum = 0.0f;
    for (int batch = 0; batch < num_batches; ++batch) {
      const RowStatistics rows(arrays.lse, arrays.delta, params, BatchedSequences::sequence(problem, batch), head);
      for (int row = threadIdx.x; row < problem.seqlen_q; row += kNumThreads) {
        const float weight = softmax_weight(options.sink(), rows.lse_of(row));
        if (weight != 0.0f) sum -= weight * rows.delta_of(row);  // 0 * NaN where packed rows belong to no sequence
      }
    }
    float* const sums = reinterpret_cast<float*>(dynamic_shared_memory());
    sums[threadIdx.x] = sum;
#pragma unroll
    for (int half = kNumThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) arrays.dsinks[head] = from_float<Element>(sums[0]);
  }
};

}  // namespace cuflash
