// The memory-bound CPU kernels: their arguments and the table of one instruction set's versions.
//
// A tensor is `rows` rows of `inner` elements. NHWC: a row is a pixel, its elements the channels, and
// coefficient i belongs to element i. NCHW: a row is a plane, and coefficient row % channels belongs
// to all of it. Bit masks have a row of ⌈inner / 8⌉ bytes beside each row. A null pointer is an
// operand that is not there. T is float, double or bf16; A is what sums and coefficients are in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../math.h"

namespace resnet_fast {

struct bf16 {
  uint16_t bits;
};

// A stored value as a number, and a number as it is stored (bf16: to nearest even, NaN stays NaN).
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

// What partial results are merged in.
template <class A>
using wider_t = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// Rows of one call of `statistics` at the most, for the sake of its sums in A.
constexpr int64_t kStatisticsRows = 128;

struct Shape {
  int64_t rows, inner, channels;
  bool nhwc;
};

// y = relu(scale·z + shift + (res_scale·residual + res_shift)) and its bit mask; one read, one write.
template <class T, class A = accumulate_t<T>>
struct BnAct {
  Shape shape;
  T* y;
  uint8_t* mask;
  const T *z, *residual;
  const A *scale, *shift, *res_scale, *res_shift;
  bool relu;
};

// dz = a·(dy under mask) + b·(z − mean) + c + (residual under residual_mask); one read, one write.
template <class T, class A = accumulate_t<T>>
struct BnActBwdApply {
  Shape shape;
  T* dz;
  const T *dy, *z, *residual;
  const uint8_t *mask, *residual_mask;
  const A *a, *mean, *b, *c;
};

// g = (dy under mask) + (residual under residual_mask), zero where scale·x + shift ≤ 0, written to `out`
// where given; Σg, Σg·xhat(z[0]), Σg·xhat(z[1]) of the rows are added to `sums`.
template <class T, class A = accumulate_t<T>>
struct GradientSums {
  Shape shape;
  T* out;
  const T *dy, *residual, *x;
  const uint8_t *mask, *residual_mask;
  const A *scale, *shift;
  const T* z[2];
  const A *mean[2], *rstd[2];
};

template <class T, class A = accumulate_t<T>>
struct Statistics {
  Shape shape;
  const T* x;
};

// One instruction set's kernels for one dtype, over rows begin, begin + step, … below end. In NHWC step
// is 1, and `sums` is [3][channels], `moments` (mean, m2) [2][channels]; in NCHW the rows are the planes
// of one channel (step = channels), and they are [3] and [2].
template <class T, class A = accumulate_t<T>>
struct Kernels {
  void (*bn_act)(const BnAct<T>&, int64_t begin, int64_t end);
  void (*bn_act_bwd_apply)(const BnActBwdApply<T>&, int64_t begin, int64_t end);
  void (*gradient_sums)(const GradientSums<T>&, int64_t begin, int64_t end, int64_t step, A* sums);
  void (*statistics)(const Statistics<T>&, int64_t begin, int64_t end, int64_t step, wider_t<A>* moments);
};

// The versions in each instruction set, and the best of them for this CPU (cpu_features.h).
namespace baseline {
template <class T>
const Kernels<T>& kernels();
}
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
}
template <class T>
const Kernels<T>& kernels();

}  // namespace resnet_fast
