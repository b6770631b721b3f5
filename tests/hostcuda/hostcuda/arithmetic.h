// The arithmetic that CUDA offers without any header. Approximate functions are exact here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace hostcuda {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace hostcuda

inline int __float_as_int(float x) { return hostcuda::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return hostcuda::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return hostcuda::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return hostcuda::bits_as<float>(x); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }

template <class X, class Y, class = std::enable_if_t<std::is_arithmetic_v<X> && std::is_arithmetic_v<Y>>>
constexpr std::common_type_t<X, Y> min(X x, Y y) {
  return y < x ? y : x;
}
template <class X, class Y, class = std::enable_if_t<std::is_arithmetic_v<X> && std::is_arithmetic_v<Y>>>
constexpr std::common_type_t<X, Y> max(X x, Y y) {
  return x < y ? y : x;
}
