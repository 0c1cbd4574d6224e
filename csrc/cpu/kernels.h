// The memory-bound CPU kernels: a table of functions for each instruction set.
#pragma once

#include "../kernel_args.h"

namespace resnet_fast {

// The type in which partial results are merged.
template <class A>
using wider_t = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// Maximum rows per call of `statistics`, which limits the rounding error of its sums in A.
constexpr int64_t kStatisticsRows = 128;

// The kernels of one instruction set and dtype, over rows begin, begin + step, … below end. NHWC: step is 1, `sums`
// is [3][channels], `moments` (mean, m2) is [2][channels]. NCHW: the rows are the planes of one channel (step =
// channels), `sums` is [3], `moments` is [2].
template <class T, class A = accumulate_t<T>>
struct Kernels {
  void (*bn_act)(const BnAct<T>&, int64_t begin, int64_t end);
  void (*bn_relu_max_pool)(const BnReluMaxPool<T>&, int64_t begin, int64_t end);  // rows of y
  void (*bn_act_bwd_apply)(const BnActBwdApply<T>&, int64_t begin, int64_t end);
  void (*gradient_sums)(const GradientSums<T>&, int64_t begin, int64_t end, int64_t step, A* sums);
  void (*statistics)(const Statistics<T>&, int64_t begin, int64_t end, int64_t step, wider_t<A>* moments);
};

// The kernels of each instruction set, and those of active_isa() (cpu_features.h).
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
