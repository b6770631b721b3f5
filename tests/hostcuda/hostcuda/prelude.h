// Everything that CUDA C++ offers without an #include, and NVIDIA's own number types, which must be read before
// __CUDA_ARCH__ is defined. Included before every kernel, as a precompiled header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "hostcuda/arithmetic.h"
#include "hostcuda/block_barrier.h"
#include "hostcuda/copy_engine.h"
#include "hostcuda/index.h"
#include "hostcuda/keywords.h"
#include "hostcuda/launch.h"
#include "hostcuda/memory.h"
#include "hostcuda/numbers.h"
#include "hostcuda/warp.h"
