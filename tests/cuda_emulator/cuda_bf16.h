// CUDA's bf16 by that of the CPU kernels.
#pragma once

#include <cuda_runtime.h>

#include "../../csrc/kernel_args.h"

using __nv_bfloat16 = resnet_fast::bf16;
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return resnet_fast::widen<float>(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return resnet_fast::narrow<resnet_fast::bf16>(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
