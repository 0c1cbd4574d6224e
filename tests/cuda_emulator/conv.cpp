// conv.h by its formula, for what CUTLASS computes on a GPU: here it is the torch side that is tested.
#include "../../csrc/cuda/conv_tiles.h"

namespace resnet_fast::cuda {
namespace {

template <class T>
void convolve(const ConvForward& a) {
  const auto *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.w), *residual = static_cast<const T*>(a.residual);
  auto* y = static_cast<T*>(a.y);
  for (int64_t pixel = 0; pixel < output_pixels(a); ++pixel) {
    const int64_t n = pixel / (a.p * a.q), p = pixel / a.q % a.p, q = pixel % a.q;
    for (int64_t k = 0; k < a.k; ++k) {
      float sum = 0;
      for (int64_t r = 0; r < a.r; ++r) {
        for (int64_t s = 0; s < a.s; ++s) {
          const int64_t row = p * a.stride[0] - a.padding[0] + r * a.dilation[0];
          const int64_t column = q * a.stride[1] - a.padding[1] + s * a.dilation[1];
          if (row < 0 || row >= a.h || column < 0 || column >= a.w_) continue;
          const T *from = x + ((n * a.h + row) * a.w_ + column) * a.c, *filter = w + ((k * a.r + r) * a.s + s) * a.c;
          for (int64_t c = 0; c < a.c; ++c) sum = fma(number<float>(from[c]), number<float>(filter[c]), sum);
        }
      }
      float v = fma(a.scale ? a.scale[k] : 1.0f, sum, a.shift ? a.shift[k] : 0.0f);
      if (residual) v += number<float>(residual[pixel * a.k + k]);
      y[pixel * a.k + k] = stored<T>(a.relu && v < 0 ? 0.0f : v);
    }
  }
}

cudaError_t forward(const ConvForward& a, int tile, int tiles) {
  if (common_refusal(a) || tile < 0 || tile >= tiles) return cudaErrorInvalidValue;
  a.dtype == Dtype::kHalf ? convolve<fp16>(a) : convolve<bf16>(a);
  return cudaSuccess;
}

}  // namespace

namespace sm90 {
int conv_rule(const ConvForward& a, int multiprocessors) { return largest_filling(kTiles, a, multiprocessors); }
const char* conv_refusal(const ConvForward& a) { return common_refusal(a); }
cudaError_t conv_forward(const ConvForward& a, int tile, cudaStream_t) { return forward(a, tile, 4); }
}  // namespace sm90

namespace sm80 {
int conv_rule(const ConvForward& a, int multiprocessors) { return largest_filling(kTiles, a, multiprocessors); }
const char* conv_refusal(const ConvForward& a) { return common_refusal(a); }
cudaError_t conv_forward(const ConvForward& a, int tile, cudaStream_t) { return forward(a, tile, 2); }
}  // namespace sm80

}  // namespace resnet_fast::cuda
