// Attention sinks: one more logit of each row, which takes weight and gives no value (Xiao et al., ICLR 2024; gpt-oss).
#pragma once

#include <cuflash/attention/sequence.cuh>
#include <cuflash/common/numbers.cuh>

namespace cuflash {

template <class T>
struct Sinks {
  const T* data;
  long long head_stride;
  float logit;  // of the head at hand

  __device__ __forceinline__ void enter(const Sequence& sequence, int head) {
    logit = sequence.padding ? -infinity() : to_float(data[head * head_stride]);
  }
};

}  // namespace cuflash
