// Shared by both families of convolution kernels: the size of the implicit GEMM, the choice of a tile, and the
// shapes that neither takes.
#pragma once

#include "conv.h"

namespace resnet_fast::cuda {

struct TileName {
  int m, n;  // output pixels and filters
  const char* name;
};

namespace sm90 {

constexpr TileName kTiles[] = {
    {256, 128, "256x128x64"}, {256, 64, "256x64x64"}, {128, 128, "128x128x64"}, {128, 64, "128x64x64"},
    {64, 64, "64x64x64"}};

// The kernels of one dtype; each dtype is compiled in a separate file.
template <Dtype DTYPE>
cudaError_t run(const ConvForward& a, int tile, cudaStream_t stream);

}  // namespace sm90

namespace sm80 {

constexpr TileName kTiles[] = {{128, 128, "128x128x32"}, {64, 64, "64x64x32"}};

}  // namespace sm80

// The GEMM is [N·P·Q, R·S·C]·[R·S·C, K].
inline int64_t output_pixels(const ConvForward& a) { return int64_t(a.n) * a.p * a.q; }

inline bool empty_output(const ConvForward& a) { return output_pixels(a) == 0 || a.k == 0; }

// The first of `tiles` (ordered from large to small) whose grid fills the GPU. A large tile reads each operand less
// often, but a multiprocessor without a tile is idle. Tiles wider than the filters are skipped.
template <int TILES>
int largest_filling(const TileName (&tiles)[TILES], const ConvForward& a, int multiprocessors) {
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t narrowest = tiles[TILES - 1].n;
  for (int i = 0; i < TILES - 1; ++i) {
    const bool too_wide = tiles[i].n > parts(a.k, narrowest) * narrowest;
    if (!too_wide && parts(output_pixels(a), tiles[i].m) * parts(a.k, tiles[i].n) >= multiprocessors) return i;
  }
  return TILES - 1;
}

inline const char* common_refusal(const ConvForward& a) {
  if (a.dtype != Dtype::kHalf && a.dtype != Dtype::kBFloat16) return "the dtype is neither bf16 nor fp16";
  if (a.c % 8 != 0 || a.k % 8 != 0) return "channels or filters are not multiples of 8";
  if (a.n < 0 || a.k < 0 || a.c < 1 || a.h < 1 || a.w_ < 1 || a.r < 1 || a.s < 1) return "x or w is empty";
  const int64_t in[] = {a.h, a.w_}, taps[] = {a.r, a.s}, out[] = {a.p, a.q};
  for (int i = 0; i < 2; ++i) {
    if (a.stride[i] < 1 || a.dilation[i] < 1) return "stride or dilation is below 1";
    if (a.padding[i] < 0) return "padding is negative";
    const int64_t room = in[i] + 2 * int64_t(a.padding[i]) - a.dilation[i] * (taps[i] - 1) - 1;
    if (room < 0) return "the filter is larger than the padded image";
    if (out[i] != room / a.stride[i] + 1) return "the output's size does not follow from the input's";
  }
  if (output_pixels(a) > INT32_MAX - 256) return "the output has about 2^31 pixels or more";  // room for one tile
  for (const void* operand : {a.x, a.w, a.residual, static_cast<const void*>(a.y)}) {
    if (reinterpret_cast<uintptr_t>(operand) % 16 != 0) return "an operand is not aligned to 16 bytes";
  }
  return nullptr;
}

}  // namespace resnet_fast::cuda
