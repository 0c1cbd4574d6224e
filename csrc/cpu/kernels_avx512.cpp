// The kernels for AVX-512 F, BW, VL and DQ: memory-bound, and convolution tiles.
#include "target.h"

#if RESNET_FAST_X86
#define RESNET_FAST_AVX512
RESNET_FAST_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "../math.h"
#include "conv_kernels.h"
#include "kernels.h"
#include "winograd.h"

namespace resnet_fast::avx512 {
#include "lanes.inl"
#include "norm.inl"
#include "transpose.inl"
#include "gemm.inl"
#include "winograd.inl"
}  // namespace resnet_fast::avx512
RESNET_FAST_TARGET_END
#endif
