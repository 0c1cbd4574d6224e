// The memory-bound kernels for any CPU.
#include "target.h"

#include "../math.h"
#include "kernels.h"

namespace resnet_fast::baseline {
#include "lanes.inl"
#include "norm.inl"
}  // namespace resnet_fast::baseline
