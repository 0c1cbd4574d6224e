// CUDA's fp16 by the compiler's.
#pragma once

#include <cstdint>
#include <cstring>

using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

inline __half __ushort_as_half(uint16_t bits) {
  __half x;
  memcpy(&x, &bits, 2);
  return x;
}

inline uint16_t __half_as_ushort(__half x) {
  uint16_t bits;
  memcpy(&bits, &x, 2);
  return bits;
}
