// Where a thread is. These are plain variables: the scheduler sets them whenever another thread goes on.
#pragma once

#include <vector_types.h>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
