// Arguments of the native kernels and their data types, for every device.
//
// A tensor is `rows` rows of `inner` elements. NHWC: a row is a pixel, its elements are the channels, and
// coefficient i belongs to element i. NCHW: a row is a plane, and coefficient row % channels belongs to
// all of it. Bit masks have ⌈inner / 8⌉ bytes per row. A null pointer is a missing operand.
// T: float, double, bf16 or fp16. A: accumulation dtype, of sums and coefficients.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math.h"

namespace resnet_fast {

struct bf16 {
  uint16_t bits;
};

struct fp16 {  // only on GPUs
  uint16_t bits;
};

// Conversion from and to the stored dtype (to bf16: round to nearest even, NaN stays NaN).
template <class A, class T>
RESNET_FAST_INLINE A widen(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  } else {
    return A(x);
  }
}

template <class T, class A>
RESNET_FAST_INLINE T narrow(A x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const float value = float(x);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return T(x);
  }
}

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Shape {
  int64_t rows, inner, channels;
  bool nhwc;
};

// y = relu(scale·z + shift + (res_scale·residual + res_shift)) and its bit mask; reads and writes each tensor once.
template <class T, class A = accumulate_t<T>>
struct BnAct {
  Shape shape;
  T* y;
  uint8_t* mask;
  const T *z, *residual;
  const A *scale, *shift, *res_scale, *res_shift;
  bool relu;
};

// dz = a·(dy under mask) + b·(z − mean) + c + (residual under residual_mask); reads and writes each tensor once. Without
// b the second term is omitted.
template <class T, class A = accumulate_t<T>>
struct BnActBwdApply {
  Shape shape;
  T* dz;
  const T *dy, *z, *residual;
  const uint8_t *mask, *residual_mask;
  const A *a, *mean, *b, *c;
};

// Windows of a max-pool from z [images, channels, height, width] to y [images, channels, rows, columns].
struct Windows {
  int64_t images, channels, height, width, rows, columns;
  int64_t kernel[2], stride[2], padding[2];
  bool nhwc;

  std::array<int64_t, 4> sizes() const { return {images, channels, rows, columns}; }  // of y
  RESNET_FAST_INLINE Shape shape(int64_t pixels) const {  // of a tensor with `pixels` per image
    return nhwc ? Shape{images * pixels, channels, channels, true} : Shape{images * channels, pixels, channels, false};
  }
  RESNET_FAST_INLINE Shape input() const { return shape(height * width); }
  RESNET_FAST_INLINE Shape output() const { return shape(rows * columns); }
};

// The range [begin, end) along one axis. 32 bits, because divisions dominate its cost.
struct Span {
  int begin, end;
};

// Positions of window `at` that lie inside the image, not in the padding.
RESNET_FAST_INLINE Span positions(const Windows& w, int axis, int at) {
  const int start = at * int(w.stride[axis]) - int(w.padding[axis]), kernel = int(w.kernel[axis]);
  const int left = int(axis == 0 ? w.height : w.width) - start;
  return {start < 0 ? -start : 0, left < kernel ? left : kernel};
}

// The windows that contain pixel `at`.
RESNET_FAST_INLINE Span windows_of(const Windows& w, int axis, int at) {
  const int from = at + int(w.padding[axis]), before = from - int(w.kernel[axis]), stride = int(w.stride[axis]);
  const int last = from / stride + 1, count = int(axis == 0 ? w.rows : w.columns);
  return {before < 0 ? 0 : before / stride + 1, last < count ? last : count};
}

constexpr int kNoPosition = 255;  // the index of a window that ReLU sets to 0

// y = max over windows of relu(scale·z + shift); index = position of the first maximum in the window.
template <class T, class A = accumulate_t<T>>
struct BnReluMaxPool {
  Windows windows;
  T* y;
  uint8_t* index;
  const T* z;
  const A *scale, *shift;
};

// g = (dy under mask) + (residual under residual_mask), zero where scale·x + shift ≤ 0; `out` receives g if it is
// given. `sums` accumulates Σg, Σg·xhat(z[0]) and Σg·xhat(z[1]) over the rows. With `index`, g is instead the gradient
// through a max-pool: Σ of dy (shaped like the pool's y) over the windows whose index names the pixel.
template <class T, class A = accumulate_t<T>>
struct GradientSums {
  Shape shape;
  T* out;
  const T *dy, *residual, *x;
  const uint8_t *mask, *residual_mask;
  const A *scale, *shift;
  const T* z[2];
  const A *mean[2], *rstd[2];
  const uint8_t* index;
  Windows windows;
};

template <class T, class A = accumulate_t<T>>
struct Statistics {
  Shape shape;
  const T* x;
};

// Geometry of a convolution y[n,p,q,k] = Σ x[n, p·stride + r·dilation − padding, …, c]·w[k,r,s,c].
struct ConvShape {
  int64_t images, height, width, channels;  // x
  int64_t rows, columns, filters;           // y
  int64_t taps[2], stride[2], padding[2], dilation[2];
  int64_t groups = 1;

  int64_t tap_count() const { return taps[0] * taps[1]; }
  bool pointwise() const {  // a plain GEMM over all pixels
    return tap_count() == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
};

}  // namespace resnet_fast
