// An array argument of a programmable score or mask.
#pragma once

#include <cuflash/common/numbers.cuh>
#include <cuflash/ptx/global_pointer.cuh>

namespace cuflash {

// Called with one index for each axis. 16-bit numbers come as float.
template <class T, int kRank>
struct ArrayView {
  const T* data;
  long long strides[kRank];

  template <class... Indices>
  __device__ __forceinline__ auto operator()(Indices... indices) const {
    static_assert(sizeof...(Indices) == kRank, "an array takes one index for each of its axes");
    const long long position[] = {indices...};
    long long offset = 0;
#pragma unroll
    for (int axis = 0; axis < kRank; ++axis) offset += position[axis] * strides[axis];
    return plain_number(ptx::global_pointer(data)[offset]);
  }

 private:
  template <class Number>
  static __device__ __forceinline__ Number plain_number(Number x) {
    return x;
  }
  static __device__ __forceinline__ float plain_number(__half x) { return to_float(x); }
  static __device__ __forceinline__ float plain_number(__nv_bfloat16 x) { return to_float(x); }
};

}  // namespace cuflash
