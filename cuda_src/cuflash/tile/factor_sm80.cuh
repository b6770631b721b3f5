// Factors of the number types that came with sm_80: bfloat16 and TF32.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/ptx/wmma_load.cuh>
#include <cuflash/tile/factor.cuh>

namespace cuflash {

template <class Use, class Layout>
struct Factor<BFloat16, Use, Layout> {
  wmma::fragment<Use, 16, 16, 16, __nv_bfloat16, Layout> value;

  __device__ __forceinline__ void load(const __nv_bfloat16* tile, int pitch) { ptx::wmma_load(value, tile, pitch); }
};

template <class Use, class Layout>
struct Factor<TFloat32, Use, Layout> {
  wmma::fragment<Use, 16, 16, 8, wmma::precision::tf32, Layout> value;

  __device__ __forceinline__ void load(const float* tile, int pitch) {
    ptx::wmma_load(value, tile, pitch);
#pragma unroll
    for (int i = 0; i < value.num_elements; ++i) value.x[i] = wmma::__float_to_tf32(value.x[i]);
  }
};

// A float32 factor as the sum of two TF32 numbers, which together hold 22 of its 24 bits. NaN and infinity go into the
// low part: there no finite number of the other factor meets them twice, with signs that could cancel to NaN.
template <class Use, class Layout>
struct Factor<Float32, Use, Layout> {
  wmma::fragment<Use, 16, 16, 8, wmma::precision::tf32, Layout> high, low;

  __device__ __forceinline__ void load(const float* tile, int pitch) {
    ptx::wmma_load(high, tile, pitch);
#pragma unroll
    for (int i = 0; i < high.num_elements; ++i) {
      const float x = high.x[i], rounded = wmma::__float_to_tf32(x);
      high.x[i] = fabsf(rounded) < infinity() ? rounded : 0.0f;
      low.x[i] = wmma::__float_to_tf32(x - high.x[i]);
    }
  }
};

// The product of the two low parts is below the rounding of float32 and left out; small terms are added first.
// Tensor cores cut off what does not fit into the sum: over many products that adds up, so these are summed outside.
template <class LayoutA, class LayoutB>
__device__ __forceinline__ void multiply_add(Accumulator<Float32>& sum,
                                             const Factor<Float32, wmma::matrix_a, LayoutA>& a,
                                             const Factor<Float32, wmma::matrix_b, LayoutB>& b) {
  Accumulator<Float32> product;
  wmma::fill_fragment(product, 0.0f);
  wmma::mma_sync(product, a.low, b.high, product);
  wmma::mma_sync(product, a.high, b.low, product);
  wmma::mma_sync(product, a.high, b.high, product);
#pragma unroll
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] += product.x[i];
}

}  // namespace cuflash
