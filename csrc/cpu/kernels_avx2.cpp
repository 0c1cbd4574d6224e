// The kernels for AVX2 and FMA: memory-bound, and convolution tiles.
#include "target.h"

#if RESNET_FAST_X86
#define RESNET_FAST_AVX2
RESNET_FAST_TARGET("avx2,fma,f16c")
#include "../math.h"
#include "conv_kernels.h"
#include "kernels.h"
#include "winograd.h"

namespace resnet_fast::avx2 {
#include "lanes.inl"
#include "norm.inl"
#include "transpose.inl"
#include "gemm.inl"
#include "winograd.inl"
}  // namespace resnet_fast::avx2
RESNET_FAST_TARGET_END
#endif
