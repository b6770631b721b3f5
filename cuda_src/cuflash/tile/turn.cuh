// Turns of warpgroups: while one starts products, the others compute what comes between them.
#pragma once

#include <cuflash/ptx/warpgroup.cuh>

namespace cuflash {

// Of one of so many warpgroups, which come in the order of their numbers: named barrier 1 + its number.
template <int kCount>
struct Turn {
  int number;

  __device__ __forceinline__ void begin() const {
    if constexpr (kCount > 1) ptx::named_barrier_sync(1 + number, 256);
  }
  __device__ __forceinline__ void pass_on() const {
    if constexpr (kCount > 1) ptx::named_barrier_arrive(1 + (number + 1) % kCount, 256);
  }
};

}  // namespace cuflash
