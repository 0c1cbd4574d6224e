// Convolutions on Hopper, as conv.h offers them: which tile, which shapes. The kernels are in conv_sm90.inl.
#include <iterator>

#include "conv_tiles.h"

namespace resnet_fast::cuda::sm90 {

int conv_tiles() { return int(std::size(kTiles)); }

const char* conv_tile_name(int tile) { return kTiles[tile].name; }

int conv_rule(const ConvForward& a, int multiprocessors) { return largest_filling(kTiles, a, multiprocessors); }

// TMA holds the strides of an im2col descriptor in 3 bits, and in a signed byte each how far the first tap and
// the last lie outside of the image.
const char* conv_refusal(const ConvForward& a) {
  if (const char* refusal = common_refusal(a)) return refusal;
  const int64_t taps[] = {a.r, a.s};
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = a.dilation[i] * (taps[i] - 1);
    if (a.stride[i] > 8) return "stride is over 8";
    if (a.padding[i] > 127) return "padding is over 127";
    if (reach - a.padding[i] > 128 || reach > 254) return "the filter spans over 128 pixels";
  }
  return nullptr;
}

cudaError_t conv_forward(const ConvForward& a, int tile, cudaStream_t stream) {
  if (conv_refusal(a) != nullptr) return cudaErrorInvalidValue;
  if (empty_output(a)) return cudaSuccess;
  return a.dtype == Dtype::kHalf ? run<Dtype::kHalf>(a, tile, stream) : run<Dtype::kBFloat16>(a, tile, stream);
}

}  // namespace resnet_fast::cuda::sm90
