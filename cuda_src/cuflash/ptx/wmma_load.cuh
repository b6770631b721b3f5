// wmma.load of bfloat16 and TF32 factors from shared memory (sm_80 and up).
// nvcuda::wmma::load_matrix_sync loads these types through generic addresses; with the address space said, the same PTX
// instruction becomes one ldmatrix (bfloat16), or takes 32-bit addresses (TF32).
#pragma once

#include <mma.h>

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

template <class Use, class Layout>
using BFloat16Factor = nvcuda::wmma::fragment<Use, 16, 16, 16, __nv_bfloat16, Layout>;
template <class Use, class Layout>
using TF32Factor = nvcuda::wmma::fragment<Use, 16, 16, 8, nvcuda::wmma::precision::tf32, Layout>;

__device__ __forceinline__ void wmma_load(BFloat16Factor<nvcuda::wmma::matrix_a, nvcuda::wmma::row_major>& factor,
                                          const __nv_bfloat16* tile, int pitch) {
  unsigned* const x = reinterpret_cast<unsigned*>(factor.x);
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(tile)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void wmma_load(BFloat16Factor<nvcuda::wmma::matrix_b, nvcuda::wmma::row_major>& factor,
                                          const __nv_bfloat16* tile, int pitch) {
  unsigned* const x = reinterpret_cast<unsigned*>(factor.x);
  asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(tile)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void wmma_load(BFloat16Factor<nvcuda::wmma::matrix_b, nvcuda::wmma::col_major>& factor,
                                          const __nv_bfloat16* tile, int pitch) {
  unsigned* const x = reinterpret_cast<unsigned*>(factor.x);
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(tile)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void wmma_load(TF32Factor<nvcuda::wmma::matrix_a, nvcuda::wmma::row_major>& factor,
                                          const float* tile, int pitch) {
  unsigned* const x = reinterpret_cast<unsigned*>(factor.x);
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k8.shared.tf32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(tile)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void wmma_load(TF32Factor<nvcuda::wmma::matrix_b, nvcuda::wmma::row_major>& factor,
                                          const float* tile, int pitch) {
  unsigned* const x = reinterpret_cast<unsigned*>(factor.x);
  asm volatile("wmma.load.b.sync.aligned.row.m16n16k8.shared.tf32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(tile)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void wmma_load(TF32Factor<nvcuda::wmma::matrix_b, nvcuda::wmma::col_major>& factor,
                                          const float* tile, int pitch) {
  unsigned* const x = reinterpret_cast<unsigned*>(factor.x);
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k8.shared.tf32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(tile)), "r"(pitch)
               : "memory");
}

}  // namespace cuflash::ptx
