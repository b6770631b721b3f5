// Sizes and options of an attention problem, as the host passes them (mirrored in cuflash/_params.py).
#pragma once

#include <cuflash/attention/band.cuh>
#include <cuflash/tile/matrix.cuh>

namespace cuflash {

struct Problem {
  int batch, num_heads, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int band_begin, band_end;
  float softmax_scale;

  __device__ __forceinline__ Band band() const { return {band_begin, band_end, seqlen_q, seqlen_k}; }
  __device__ __forceinline__ int group_size() const { return num_heads / num_heads_kv; }
};

struct FwdParams {
  Strides q, k, v, out, lse;
  Problem problem;
};

struct BwdParams {
  Strides q, k, v, out, dout, lse, dq, dk, dv;
  Problem problem;
};

}  // namespace cuflash
