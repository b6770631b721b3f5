// Keys that come two by two.
#pragma once

#include <cuflash/common/numbers.cuh>

namespace cuflash {

// A key that is the first or the second of two neighbours in a row, of which the first has an even place in the tile.
// Who asks for both at places that the compiler knows has a word of two elements loaded once.
struct Neighbour {
  int first;
  bool second;

  __device__ __forceinline__ operator int() const { return first + second; }
};

// Two elements in a word, and one of them as what it is used as.
template <class T>
struct TwoElements;
template <>
struct TwoElements<bool> {
  using Word = unsigned short;
  static __device__ __forceinline__ bool pick(Word word, bool second) { return word & (second ? 0xff00 : 0x00ff); }
};
template <>
struct TwoElements<__half> {
  using Word = unsigned;
  static __device__ __forceinline__ float pick(Word word, bool second) {
    return to_float(__ushort_as_half(static_cast<unsigned short>(word >> (second ? 16 : 0))));
  }
};
template <>
struct TwoElements<__nv_bfloat16> {
  using Word = unsigned;
  // A bfloat16 is the upper half of a float.
  static __device__ __forceinline__ float pick(Word word, bool second) {
    return __uint_as_float(second ? word & 0xffff0000 : word << 16);
  }
};
template <>
struct TwoElements<float> {
  using Word = float2;
  static __device__ __forceinline__ float pick(Word word, bool second) { return second ? word.y : word.x; }
};

}  // namespace cuflash
