// The convolutions of csrc/cuda, free of torch: NHWC tensors by pointer, one launch a call.
#pragma once

#include <cstdint>

#include "device.h"

namespace resnet_fast::cuda {

// y = relu(scale[k]·conv(x, w) + shift[k] + residual), all dense: x [N,H,W,C], w [K,R,S,C], y and residual
// [N,P,Q,K] in `dtype` (bf16 or fp16), scale and shift [K] in fp32. A null scale is 1, a null shift 0, a null
// residual is left out; `relu` likewise. P = (H + 2·padding − dilation·(R − 1) − 1)/stride + 1, Q alike.
struct ConvForward {
  Dtype dtype;
  const void *x, *w, *residual;
  void* y;
  const float *scale, *shift;
  int32_t n, h, w_, c, k, r, s, p, q;
  int32_t stride[2], padding[2], dilation[2];
  bool relu;
};

// Each of these is one family of kernels: sm_90a by CUTLASS' Hopper collectives (im2col TMA, wgmma), sm_80 to
// sm_89 (and any later GPU) by its implicit GEMM of Ampere (cp.async, mma).
//   tiles    how many tile shapes there are, and `tile_name` what each is called: "128x64x64"
//   rule     the tile for a shape on a GPU of that many multiprocessors, where no table knows better
//   refusal  why the shape cannot be taken, nullptr where it can
//   run      one launch on `stream`; nothing is allocated, no memory but the operands' is touched
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
