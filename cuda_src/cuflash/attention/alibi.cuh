// Attention with linear biases (Press et al., ICLR 2022): scores fall with the distance from the diagonal.
#pragma once

#include <cuflash/attention/sequence.cuh>

namespace cuflash {

struct Alibi {
  const float* slopes;
  long long batch_stride, head_stride;
  float inverse_scale;  // of the softmax
  float slope;          // of the head at hand
  int diagonal;         // of the sequence at hand

  __device__ __forceinline__ void enter(const Sequence& sequence, int head) {
    slope = sequence.padding ? 0.0f : slopes[sequence.batch * batch_stride + head * head_stride];
    diagonal = sequence.seqlen_k - sequence.seqlen_q;
  }

  __device__ __forceinline__ float bias(int query, int key) const { return -slope * fabsf(distance(query, key)); }

  // The same in units of products, what is left to do of the scale.
  __device__ __forceinline__ float penalty(int query, int key) const {
    return slope * inverse_scale * fabsf(distance(query, key));
  }

  // On either side of the diagonal they are a line. Near it they are small, and would be the difference of large
  // numbers.
  __device__ __forceinline__ bool penalties_are_line(int query, int key, int width) const {
    return fabsf(distance(query, key)) >= width;
  }
  __device__ __forceinline__ float penalty_step(int query, int key) const {
    return (query + diagonal > key ? slope : -slope) * inverse_scale;
  }

 private:
  __device__ __forceinline__ float distance(int query, int key) const {
    return small_int_to_float(query + diagonal - key);
  }

  // Exact below 2^22 in magnitude, where the bits of 1.5 * 2^23 + x hold x: two cheap instructions in place of a slow
  // conversion. The host refuses longer sequences.
  static __device__ __forceinline__ float small_int_to_float(int x) {
    return __int_as_float(0x4B400000 + x) - 12582912.0f;
  }
};

}  // namespace cuflash
