// 3x3 convolutions with Winograd's minimal filtering F(2x2, 3x3), in fp32 arithmetic (Lavin & Gray 2016, arXiv:1509.09308): the
// four outputs of a tile take 16 products; a direct convolution takes 36.
//   y = Aᵀ[Σ over channels of (G g Gᵀ) ⊙ (Bᵀ d B)]A    d: the tile's 4x4 patch of x, g: a 3x3 filter
//
//        1  0 -1  0        1    0    0
//   Bᵀ = 0  1  1  0    G = 1/2  1/2  1/2    Aᵀ = 1  1  1  0
//        0 -1  1  0        1/2 -1/2  1/2         0  1 -1 -1
//        0  1  0 -1        0    0    1
//
// The sums have one term per channel, not nine, which compensates the extra additions: measured rounding errors are 0.5
// to 1.7 times those of the direct tiles (dw: up to 2), less than half of the limit in resnet_fast/spec/tolerance.py.
// An output depends only on the pixels of its window, as Aᵀ omits the products of the others, but an infinity in the
// window may become NaN. Larger tiles would save more products, but lose precision.
#pragma once

#include "tiled_conv.h"

namespace resnet_fast {

constexpr int kWinogradProducts = 16;
constexpr int64_t kMostWinogradChannels = 1 << 14;

// The transforms of `channels` channels (a multiple of 16); the values of the 16 products are `pitch` apart.
template <class T>
struct WinogradKernels {
  // u = G g Gᵀ, where tap (i, j) of the filter is at g[3·i + j].
  void (*filter)(const float* const g[9], int64_t channels, float* u, int64_t pitch);
  // v = Bᵀ d B, where pixel (i, j) of the patch is at d[4·i + j].
  void (*input)(const T* const d[16], int64_t channels, float* v, int64_t pitch);
  // y = relu(scale·Aᵀ m A + shift + residual), where pixel (i, j) of y is at y[2·i + j], nullptr outside the image, and
  // its residual likewise; a null scale, shift or residual is missing.
  void (*output)(const float* m, int64_t pitch, int64_t channels, T* const y[4], const T* const residual[4],
                 const float* scale, const float* shift, bool relu);
  // The transposes, for dw = Gᵀ[Σ over tiles of (A dy Aᵀ) ⊙ (Bᵀ d B)]G: m = A dy Aᵀ, where pixel (i, j) of dy is
  // at dy[2·i + j]; and dw = Gᵀ u G, where tap (i, j) is at dw[3·i + j].
  void (*output_gradient)(const T* const dy[4], int64_t channels, float* m, int64_t pitch);
  void (*filter_gradient)(const float* u, int64_t pitch, int64_t channels, float* const dw[9]);
};

namespace avx2 {
template <class T>
const WinogradKernels<T>& winograd_kernels();
}
namespace avx512 {
template <class T>
const WinogradKernels<T>& winograd_kernels();
}

namespace cpu {

// Whether Winograd takes the shape: one that tiled_conv.h takes in fp32 arithmetic (bf16 on CPUs without products of
// bf16), 3x3, stride 1, and enough tiles per thread to outweigh filters that are 16/9 as large.
template <class T>
bool winograd_takes(const ConvShape& shape);

// The shape of dgrad as a convolution: the transpose of `shape`, with filters rotated by 180°.
ConvShape transposed(const ConvShape& shape);

// Filters [K,C,3,3] as the panels of 16 matrices; rotated for dgrad.
template <class T>
at::Tensor winograd_filters(const at::Tensor& w, bool for_dgrad, Allocate allocate);

// As tiled_conv_fprop, with `filters` from winograd_filters.
template <class T>
void winograd(
    const ConvShape& shape, const T* x, const FillRow<T>& fill, const at::Tensor& filters, const float* scale,
    const float* shift, const T* residual, bool relu, T* y, const Finish& finish);

// As tiled_conv_wgrad.
template <class T>
at::Tensor winograd_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz);

}  // namespace cpu
}  // namespace resnet_fast
