// The convolutions of csrc/cuda, without torch: NHWC tensors by pointer, one launch per call.
#pragma once

#include <cstdint>

#include "device.h"

namespace resnet_fast::cuda {

// y = relu(scale[k]·conv(x, w) + shift[k] + residual), all dense: x [N,H,W,C], w [K,R,S,C], y and residual
// [N,P,Q,K] in `dtype` (bf16 or fp16), scale and shift [K] in fp32. A null scale is 1, a null shift is 0, a null
// residual is omitted, and ReLU is omitted unless `relu`. P = (H + 2·padding − dilation·(R − 1) − 1)/stride + 1, and
// Q likewise.
struct ConvForward {
  Dtype dtype;
  const void *x, *w, *residual;
  void* y;
  const float *scale, *shift;
  int32_t n, h, w_, c, k, r, s, p, q;
  int32_t stride[2], padding[2], dilation[2];
  bool relu;
};

// Two families of kernels: sm90 (sm_90a) uses CUTLASS' Hopper collectives (im2col TMA, wgmma); sm80, for sm_80 to
// sm_89 and GPUs after Hopper, uses CUTLASS' implicit GEMM for Ampere (cp.async, mma).
//   conv_tiles      the number of tile shapes; conv_tile_name gives a tile's name, such as "128x64x64"
//   conv_rule       the tile for a shape, on a GPU with that many multiprocessors
//   conv_refusal    why the kernels do not take the shape; nullptr if they do
//   conv_forward    one launch on `stream`; it allocates no GPU memory and accesses only the operands
namespace sm90 {
int conv_tiles();
const char* conv_tile_name(int tile);
int conv_rule(const ConvForward&, int multiprocessors);
const char* conv_refusal(const ConvForward&);
cudaError_t conv_forward(const ConvForward&, int tile, cudaStream_t stream);
}  // namespace sm90

namespace sm80 {
int conv_tiles();
const char* conv_tile_name(int tile);
int conv_rule(const ConvForward&, int multiprocessors);
const char* conv_refusal(const ConvForward&);
cudaError_t conv_forward(const ConvForward&, int tile, cudaStream_t stream);
}  // namespace sm80

}  // namespace resnet_fast::cuda
