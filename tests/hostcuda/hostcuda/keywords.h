// CUDA's keywords. NVIDIA's headers define some of them for host compilers; include those first.
#pragma once

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __managed__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __cluster_dims__
#undef __grid_constant__
#undef __align__

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

// One block runs at a time, so a static variable is shared by its threads. The section is filled with NaN before each
// block. (GCC allows such variables either in templates and inline functions or in ordinary ones, not in both.)
#define __shared__ static __attribute__((section("hostcuda_shared")))
