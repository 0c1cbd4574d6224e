// Memory for large results. Fresh memory costs page faults, for 50 MB more time than BN and ReLU take, and
// the C library gives large blocks back to the system at every free; so blocks from kLeastBytes up are kept
// here for the next result of about their size.
#pragma once

#include <ATen/ATen.h>

namespace resnet_fast::cpu {

constexpr int64_t kLeastBytes = 256 << 10;

// An uninitialized tensor like at::empty's (NaN where deterministic algorithms fill uninitialized memory).
// At most RESNET_FAST_CPU_CACHE_MB (default: an eighth of the machine's memory; 0 keeps nothing) stay
// cached; torch.profiler sees these blocks as it sees ATen's.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

// Give the cached blocks back to the system; how many bytes there were.
int64_t empty_cache();

}  // namespace resnet_fast::cpu
