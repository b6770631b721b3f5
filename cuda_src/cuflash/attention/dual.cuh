// Dual numbers: a value and its derivative, carried through the same expression (Clifford 1873).
#pragma once

#include <cuflash/common/math.cuh>

// In a namespace of their own, so that they do not hide CUDA's functions of the same names.
namespace cuflash::dual {

// A kernel that never looks at the slope does not compute it: the compiler drops what nobody reads.
struct Dual {
  float value, slope;

  __device__ __forceinline__ Dual(float value, float slope = 0.0f) : value(value), slope(slope) {}

  __device__ __forceinline__ Dual& operator+=(Dual x);
  __device__ __forceinline__ Dual& operator-=(Dual x);
  __device__ __forceinline__ Dual& operator*=(Dual x);
  __device__ __forceinline__ Dual& operator/=(Dual x);
};

__device__ __forceinline__ Dual operator+(Dual x) { return x; }
__device__ __forceinline__ Dual operator-(Dual x) { return {-x.value, -x.slope}; }
__device__ __forceinline__ Dual operator+(Dual x, Dual y) { return {x.value + y.value, x.slope + y.slope}; }
__device__ __forceinline__ Dual operator-(Dual x, Dual y) { return {x.value - y.value, x.slope - y.slope}; }
__device__ __forceinline__ Dual operator*(Dual x, Dual y) {
  return {x.value * y.value, x.slope * y.value + x.value * y.slope};
}
__device__ __forceinline__ Dual operator/(Dual x, Dual y) {
  const float ratio = x.value / y.value;
  return {ratio, (x.slope - ratio * y.slope) / y.value};
}

__device__ __forceinline__ Dual& Dual::operator+=(Dual x) { return *this = *this + x; }
__device__ __forceinline__ Dual& Dual::operator-=(Dual x) { return *this = *this - x; }
__device__ __forceinline__ Dual& Dual::operator*=(Dual x) { return *this = *this * x; }
__device__ __forceinline__ Dual& Dual::operator/=(Dual x) { return *this = *this / x; }

__device__ __forceinline__ bool operator<(Dual x, Dual y) { return x.value < y.value; }
__device__ __forceinline__ bool operator>(Dual x, Dual y) { return x.value > y.value; }
__device__ __forceinline__ bool operator<=(Dual x, Dual y) { return x.value <= y.value; }
__device__ __forceinline__ bool operator>=(Dual x, Dual y) { return x.value >= y.value; }
__device__ __forceinline__ bool operator==(Dual x, Dual y) { return x.value == y.value; }
__device__ __forceinline__ bool operator!=(Dual x, Dual y) { return x.value != y.value; }

// value = f(x.value), and the derivative of f there.
__device__ __forceinline__ Dual chain(Dual x, float value, float derivative) { return {value, x.slope * derivative}; }

__device__ __forceinline__ Dual exp(Dual x) {
  const float y = ::expf(x.value);
  return chain(x, y, y);
}
__device__ __forceinline__ Dual exp2(Dual x) {
  const float y = ::exp2f(x.value);
  return chain(x, y, kLn2 * y);
}
__device__ __forceinline__ Dual log(Dual x) { return chain(x, ::logf(x.value), 1.0f / x.value); }
__device__ __forceinline__ Dual log2(Dual x) { return chain(x, ::log2f(x.value), kLog2e / x.value); }
__device__ __forceinline__ Dual log1p(Dual x) { return chain(x, ::log1pf(x.value), 1.0f / (1.0f + x.value)); }
__device__ __forceinline__ Dual sqrt(Dual x) {
  const float y = ::sqrtf(x.value);
  return chain(x, y, 0.5f / y);
}
__device__ __forceinline__ Dual tanh(Dual x) {
  const float y = ::tanhf(x.value);
  return chain(x, y, 1.0f - y * y);
}
__device__ __forceinline__ Dual sin(Dual x) { return chain(x, ::sinf(x.value), ::cosf(x.value)); }
__device__ __forceinline__ Dual cos(Dual x) { return chain(x, ::cosf(x.value), -::sinf(x.value)); }
__device__ __forceinline__ Dual erf(Dual x) {
  return chain(x, ::erff(x.value), 1.1283791670955126f * ::expf(-x.value * x.value));  // 2 / sqrt(pi)
}
__device__ __forceinline__ Dual abs(Dual x) { return x.value < 0.0f ? -x : x; }
__device__ __forceinline__ Dual max(Dual x, Dual y) { return x.value < y.value ? y : x; }
__device__ __forceinline__ Dual min(Dual x, Dual y) { return y.value < x.value ? y : x; }
__device__ __forceinline__ Dual pow(Dual x, float exponent) {
  const float slope = exponent == 0.0f ? 0.0f : exponent * ::powf(x.value, exponent - 1.0f);
  return chain(x, ::powf(x.value, exponent), slope);
}
__device__ __forceinline__ Dual pow(float x, Dual exponent) {
  const float y = ::powf(x, exponent.value);
  return chain(exponent, y, x == 0.0f && exponent.value >= 0.0f ? 0.0f : ::logf(x) * y);
}
__device__ __forceinline__ bool isfinite(Dual x) { return ::fabsf(x.value) < infinity(); }
__device__ __forceinline__ bool isinf(Dual x) { return ::fabsf(x.value) == infinity(); }
__device__ __forceinline__ bool isnan(Dual x) { return x.value != x.value; }

// The names that CUDA gives these functions for float.
__device__ __forceinline__ Dual expf(Dual x) { return exp(x); }
__device__ __forceinline__ Dual exp2f(Dual x) { return exp2(x); }
__device__ __forceinline__ Dual logf(Dual x) { return log(x); }
__device__ __forceinline__ Dual log2f(Dual x) { return log2(x); }
__device__ __forceinline__ Dual log1pf(Dual x) { return log1p(x); }
__device__ __forceinline__ Dual sqrtf(Dual x) { return sqrt(x); }
__device__ __forceinline__ Dual tanhf(Dual x) { return tanh(x); }
__device__ __forceinline__ Dual sinf(Dual x) { return sin(x); }
__device__ __forceinline__ Dual cosf(Dual x) { return cos(x); }
__device__ __forceinline__ Dual erff(Dual x) { return erf(x); }
__device__ __forceinline__ Dual fabs(Dual x) { return abs(x); }
__device__ __forceinline__ Dual fabsf(Dual x) { return abs(x); }
__device__ __forceinline__ Dual fmax(Dual x, Dual y) { return max(x, y); }
__device__ __forceinline__ Dual fmaxf(Dual x, Dual y) { return max(x, y); }
__device__ __forceinline__ Dual fmin(Dual x, Dual y) { return min(x, y); }
__device__ __forceinline__ Dual fminf(Dual x, Dual y) { return min(x, y); }
__device__ __forceinline__ Dual powf(Dual x, float exponent) { return pow(x, exponent); }
__device__ __forceinline__ Dual powf(float x, Dual exponent) { return pow(x, exponent); }

}  // namespace cuflash::dual

namespace cuflash {

using dual::Dual;

}  // namespace cuflash
