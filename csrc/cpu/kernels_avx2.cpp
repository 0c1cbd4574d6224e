// The memory-bound kernels for AVX2 and FMA.
#include "target.h"

#if RESNET_FAST_X86
#define RESNET_FAST_AVX2
RESNET_FAST_TARGET("avx2,fma,f16c")
#include "../math.h"
#include "kernels.h"

namespace resnet_fast::avx2 {
#include "lanes.inl"
#include "norm.inl"
}  // namespace resnet_fast::avx2
RESNET_FAST_TARGET_END
#endif
