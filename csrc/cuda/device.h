// Shared by all files of csrc/cuda: data types, the number of multiprocessors, kernel launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../kernel_args.h"

namespace resnet_fast::cuda {

enum class Dtype : int8_t { kFloat, kDouble, kHalf, kBFloat16 };

// Conversion from and to the stored dtype; `stored` rounds to nearest even.
template <class A, class T>
__device__ __forceinline__ A number(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __bfloat162float(__ushort_as_bfloat16(x.bits));
  } else if constexpr (std::is_same_v<T, fp16>) {
    return __half2float(__ushort_as_half(x.bits));
  } else {
    return x;
  }
}

template <class T, class A>
__device__ __forceinline__ T stored(A x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<T, fp16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return x;
  }
}

// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, const A&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

}  // namespace resnet_fast::cuda
