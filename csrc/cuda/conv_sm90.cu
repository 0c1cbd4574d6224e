// Convolutions on Hopper (conv.h): choice of the tile, and supported shapes. The kernels are in conv_sm90.inl.
#include <iterator>

#include "conv_tiles.h"

namespace resnet_fast::cuda::sm90 {

int conv_tiles() { return int(std::size(kTiles)); }

const char* conv_tile_name(int tile) { return kTiles[tile].name; }

int conv_rule(const ConvForward& a, int multiprocessors) { return largest_filling(kTiles, a, multiprocessors); }

// An im2col TMA descriptor has 3 bits for each stride, and one signed byte for each distance of the first and the
// last tap from the image's border.
const char* conv_refusal(const ConvForward& a) {
  if (const char* refusal = common_refusal(a)) return refusal;
  const int64_t taps[] = {a.r, a.s};
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = a.dilation[i] * (taps[i] - 1);
    if (a.stride[i] > 8) return "a stride is more than 8";
    if (a.padding[i] > 127) return "a padding is more than 127";
    if (reach - a.padding[i] > 128 || reach > 254) return "the filter spans over 128 pixels past its padding, or 254";
  }
  return nullptr;
}

cudaError_t conv_forward(const ConvForward& a, int tile, cudaStream_t stream) {
  if (conv_refusal(a) != nullptr) return cudaErrorInvalidValue;
  if (empty_output(a)) return cudaSuccess;
  return a.dtype == Dtype::kHalf ? run<Dtype::kHalf>(a, tile, stream) : run<Dtype::kBFloat16>(a, tile, stream);
}

}  // namespace resnet_fast::cuda::sm90
