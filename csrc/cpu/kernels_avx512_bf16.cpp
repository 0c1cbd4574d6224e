// The bf16 convolution tiles for AVX-512 BF16.
#include "target.h"

#if RESNET_FAST_X86
#define RESNET_FAST_AVX512
#define RESNET_FAST_AVX512_BF16
RESNET_FAST_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "../math.h"
#include "conv_kernels.h"
#include "kernels.h"

namespace resnet_fast::avx512_bf16 {
#include "lanes.inl"
#include "transpose.inl"
#include "gemm.inl"
}  // namespace resnet_fast::avx512_bf16
RESNET_FAST_TARGET_END
#endif
