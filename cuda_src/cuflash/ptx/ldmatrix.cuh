// ldmatrix: four 8 x 8 matrices of 16-bit elements from shared memory to the registers of a warp (sm_75 and up).
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8: 16 bytes, aligned. Of matrix i it gets x[i]: elements
// 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void ldmatrix(unsigned (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

}  // namespace cuflash::ptx
