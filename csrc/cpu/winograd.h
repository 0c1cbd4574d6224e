// 3x3 convolutions with Winograd's minimal filtering F(m×m, 3x3) in fp32 arithmetic (Lavin & Gray 2016,
// arXiv:1509.09308): with n = m + 2, a tile of m×m outputs takes n×n products per channel; a direct convolution 9·m×m.
//   y = Aᵀ[Σ over channels of (G g Gᵀ) ⊙ (Bᵀ d B)]A    d: the tile's n×n patch of x, g: a 3x3 filter
//
// m = 2, for fp32: 16 products instead of 36.
//
//        1  0 -1  0        1    0    0
//   Bᵀ = 0  1  1  0    G = 1/2  1/2  1/2    Aᵀ = 1  1  1  0
//        0 -1  1  0        1/2 -1/2  1/2         0  1 -1 -1
//        0  1  0 -1        0    0    1
//
// The sums have one term per channel, not nine, which compensates the extra additions: measured rounding errors are 0.5
// to 1.7 times those of the direct tiles (dw: up to 2), less than half of the limit in resnet_fast/spec/tolerance.py.
// An output depends only on the pixels of its window, as Aᵀ omits the products of the others, but an infinity in the
// window may become NaN.
//
// m = 4, for bf16: 36 products instead of 144, in fp32; products of bf16 are at most twice as fast without AMX. The
// rounding errors (measured: 5e-6 of the largest y, 64 and 128 channels) are larger than with m = 2, but far below the
// rounding of y to bf16.
//
//        4  0 -5  0  1  0         1/4    0    0
//        0 -4 -4  1  1  0        -1/6 -1/6 -1/6         1  1  1  1  1  0
//   Bᵀ = 0  4 -4 -1  1  0    G = -1/6  1/6 -1/6    Aᵀ = 0  1 -1  2 -2  0
//        0 -2 -1  2  1  0        1/24 1/12  1/6         0  1  1  4  4  0
//        0  2 -1 -2  1  0        1/24 -1/12 1/6         0  1 -1  8 -8  1
//        0  4  0 -5  0  1          0    0    1
//
// Here an output also depends on the rest of its patch, whose products cancel only up to rounding; an infinity there
// would make it NaN. So a result that is not finite is computed again by another method.
#pragma once

#include "tiled_conv.h"

namespace resnet_fast {

constexpr int64_t kMostWinogradChannels = 1 << 14;

// The transforms of `channels` channels (a multiple of 16); the values of the n×n products are `pitch` apart.
template <class T>
struct WinogradKernels {
  // u = G g Gᵀ for a panel of 32 filters, where tap (i, j) is at g[3·i + j] as the tiles pack it, with `values` channels
  // per step.
  void (*panel)(const char* const* g, int64_t values, int64_t channels, float* u, int64_t pitch);
  // v = Bᵀ d B, where pixel (i, j) of the patch is at d[n·i + j].
  void (*input)(const T* const* d, int64_t channels, float* v, int64_t pitch);
  // y = relu(scale·Aᵀ m A + shift + residual), where pixel (i, j) of y is at y[m·i + j], nullptr outside the image, and
  // its residual likewise; a null scale, shift or residual is missing. For m = 4, returns whether Aᵀ m A is finite.
  bool (*output)(const float* m, int64_t pitch, int64_t channels, T* const* y, const T* const* residual,
                 const float* scale, const float* shift, bool relu);
  // The transposes, for dw = Gᵀ[Σ over tiles of (A dy Aᵀ) ⊙ (Bᵀ d B)]G: m = A dy Aᵀ, where pixel (i, j) of dy is
  // at dy[m·i + j]; and dw = Gᵀ u G, where tap (i, j) is at dw[3·i + j]. For m = 4, the latter returns whether dw is
  // finite.
  void (*output_gradient)(const T* const* dy, int64_t channels, float* m, int64_t pitch);
  bool (*filter_gradient)(const float* u, int64_t pitch, int64_t channels, float* const* dw);
};

namespace avx2 {
template <class T, int kTile>
const WinogradKernels<T>& winograd_kernels();
}
namespace avx512 {
template <class T, int kTile>
const WinogradKernels<T>& winograd_kernels();
}

namespace cpu {

// m for a shape that Winograd takes, else 0. It takes what tiled_conv.h takes (bf16 on CPUs without AMX) with 3x3 taps and
// stride 1, and enough tiles per thread to outweigh larger filters: n·n values in fp32 instead of 9.
template <class T>
int winograd_tile(const ConvShape& shape);

// Whether Winograd takes the shape with filters from winograd_filters. It makes U of larger ones in every call, from
// those of the tiles, and does not compute their dw.
template <class T>
bool winograd_keeps(const ConvShape& shape);

// The shape of dgrad as a convolution: the transpose of `shape`, with filters rotated by 180°.
ConvShape transposed(const ConvShape& shape);

// The panels of U, of filters as the tiles of `shape` pack them; `rotated` for dgrad.
template <class T>
at::Tensor winograd_filters(const ConvShape& shape, const at::Tensor& packed, bool rotated, Allocate allocate);

// As tiled_conv_fprop, with `filters` from winograd_filters or, where it does not keep them, those of the tiles, which
// are `rotated` for dgrad.
template <class T>
bool winograd(
    const ConvShape& shape, const T* x, const FillRow<T>& fill, const at::Tensor& filters, bool rotated,
    const float* scale, const float* shift, const T* residual, bool relu, T* y, const Finish& finish);

// As tiled_conv_wgrad.
template <class T>
at::Tensor winograd_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz);

}  // namespace cpu
}  // namespace resnet_fast
