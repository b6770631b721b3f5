// Sizes and options of an attention problem, as the host passes them (mirrored in cuflash/_params.py).
#pragma once

#include <cuflash/attention/band.cuh>
#include <cuflash/tile/matrix.cuh>

namespace cuflash {

struct Problem {
  int batch, num_heads, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int window_begin, window_end;  // of the band, relative to the diagonal
  int bottom_right;              // whether the diagonal ends at the last key, or starts at the first
  float softmax_scale;

  __device__ __forceinline__ int group_size() const { return num_heads / num_heads_kv; }

  // The limits are clamped, so that sums of an index and a limit stay in 32 bits.
  __device__ __forceinline__ Band band(int seqlen_q, int seqlen_k) const {
    const int diagonal = bottom_right ? seqlen_k - seqlen_q : 0;
    return {clamp(diagonal + window_begin, -seqlen_q, seqlen_k), clamp(diagonal + window_end, -seqlen_q, seqlen_k),
            seqlen_q, seqlen_k};
  }
};

struct FwdParams {
  Strides q, k, v, out, lse;
  Problem problem;
};

struct MergeParams {
  Strides out, lse, parts, part_sums;
  Problem problem;
  int num_rows, num_parts;  // of all heads; of each head's keys
};

struct BwdParams {
  Strides q, k, v, out, dout, lse, dlse, delta, dq, dk, dv;
  Problem problem;
};

struct DbiasParams {
  Strides q, k, v, dout, lse, delta, dbias;
  Problem problem;
  int batch, heads, rows, cols;  // of the bias; 1 along axes that it was broadcast along
};

}  // namespace cuflash
