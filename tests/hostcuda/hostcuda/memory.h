// Checks of addresses, loads through the read-only cache, and atomic operations.
#pragma once

#include <type_traits>

#include "hostcuda/arithmetic.h"
#include "hostcuda/scheduler.h"

namespace hostcuda {

// Instructions that take 32-bit shared addresses cannot reach anything else.
inline void check_in_shared_memory(const void* pointer, const char* operation, Site site) {
  const auto* const byte = static_cast<const unsigned char*>(pointer);
  if (byte < block->shared_memory || byte >= block->shared_memory + block->shared_bytes) {
    fail("%s at %s:%d: the address is not in dynamic shared memory", operation, site.file, site.line);
  }
}

}  // namespace hostcuda

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// Relaxed, as on the GPU: ThreadSanitizer sees no race between two of them, and no order either.
template <class T>
inline T atomicAdd(T* address, T value) {
  static_assert(std::is_arithmetic_v<T>);
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    Bits* const cell = reinterpret_cast<Bits*>(address);
    Bits old = __atomic_load_n(cell, __ATOMIC_RELAXED);
    Bits sum;
    do {
      sum = hostcuda::bits_as<Bits>(hostcuda::bits_as<T>(old) + value);
    } while (!__atomic_compare_exchange_n(cell, &old, sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return hostcuda::bits_as<T>(old);
  }
}

inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

[[noreturn]] inline void __trap() { hostcuda::fail("__trap"); }
