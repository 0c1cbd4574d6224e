// The memory-bound CPU kernels: the table of one instruction set's versions.
#pragma once

#include "../kernel_args.h"

namespace resnet_fast {

// What partial results are merged in.
template <class A>
using wider_t = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// Rows of one call of `statistics` at the most, for the sake of its sums in A.
constexpr int64_t kStatisticsRows = 128;

// One instruction set's kernels for one dtype, over rows begin, begin + step, … below end. In NHWC step
// is 1, and `sums` is [3][channels], `moments` (mean, m2) [2][channels]; in NCHW the rows are the planes
// of one channel (step = channels), and they are [3] and [2].
template <class T, class A = accumulate_t<T>>
struct Kernels {
  void (*bn_act)(const BnAct<T>&, int64_t begin, int64_t end);
  void (*bn_relu_max_pool)(const BnReluMaxPool<T>&, int64_t begin, int64_t end);  // rows of y
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
