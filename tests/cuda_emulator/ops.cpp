// The torch side of csrc/cuda, registered for CPU tensors as resnet_fast_emulated.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#define is_cuda is_cpu
#include "../../csrc/tensors.cpp"

#include "../../csrc/cuda/norm.h"

namespace emulator {
int64_t splits = 0;  // partial results of every reduction, where a test sets them
}
#define reduction_splits(...) (emulator::splits ? emulator::splits : reduction_splits(__VA_ARGS__))

#define CUDA CPU
#define resnet_fast_native resnet_fast_emulated
#include "../../csrc/cuda/ops.cpp"
#include "../../csrc/schemas.cpp"

// Kernels launched so far; CUTLASS' convolutions are not among them.
extern "C" __attribute__((visibility("default"))) int64_t emulated_launches() { return emulator::launches; }

// Partial results a channel of every reduction from now on; 0: as many as the kernels choose.
extern "C" __attribute__((visibility("default"))) void emulate_splits(int64_t count) { emulator::splits = count; }
