// The factors of a matrix product on tensor cores, through the portable nvcuda::wmma interface.
#pragma once

#include <mma.h>

#include <cuflash/common/numbers.cuh>

namespace cuflash {

namespace wmma = nvcuda::wmma;

// The depth of one product of fragments: 16 for 2-byte elements, 8 for TF32.
template <class Number>
constexpr int kFragmentDepth = 32 / static_cast<int>(sizeof(typename Number::Element));

// 16 x 16 float32 results, spread over the lanes of a warp in an order that CUDA leaves open (see FragmentMap).
template <class Number>
using Accumulator = wmma::fragment<wmma::accumulator, 16, 16, kFragmentDepth<Number>, float>;

// A factor of a product. `Use` is wmma::matrix_a or matrix_b, `Layout` the order of its elements in memory.
template <class Number, class Use, class Layout>
struct Factor {
  wmma::fragment<Use, 16, 16, 16, typename Number::Element, Layout> value;

  __device__ __forceinline__ void load(const typename Number::Element* tile, int pitch) {
    wmma::load_matrix_sync(value, tile, pitch);
  }
};

// sum += a * b
template <class Number, class LayoutA, class LayoutB>
__device__ __forceinline__ void multiply_add(Accumulator<Number>& sum, const Factor<Number, wmma::matrix_a, LayoutA>& a,
                                             const Factor<Number, wmma::matrix_b, LayoutB>& b) {
  wmma::mma_sync(sum, a.value, b.value, sum);
}

}  // namespace cuflash
