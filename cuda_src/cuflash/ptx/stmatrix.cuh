// stmatrix: 8 x 8 matrices from the registers of a warp to shared memory (sm_90).
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

// Four matrices of 2-byte elements, as products hold them: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix(void* shared, const unsigned (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace cuflash::ptx
