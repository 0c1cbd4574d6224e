// The memory-bound ops on CPU tensors, for the op registrations (norm.cpp) and for the convolutions.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <tuple>
#include <utility>

#include "kernels.h"

namespace resnet_fast::cpu {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Rows and elements of a dense 4-D tensor, as in resnet_fast/layout.py.
Shape shape_of(const Tensor& x);

// The format results computed from x (and a filter) take, as resnet_fast.layout.memory_format.
at::MemoryFormat format_of(const Tensor& x, const Tensor* weight = nullptr);

at::ScalarType accumulate_type(const Tensor& x);

// Data of an optional operand, nullptr where there is none.
template <class T>
const T* data(const OptTensor& t) {
  return t.has_value() && t->numel() > 0 ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// f(T{}) with T = float, double or bf16 for the tensor's dtype.
template <class F>
auto dispatch(const Tensor& x, const char* op, F f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(bf16{});
    default:
      TORCH_CHECK_TYPE(false, op, ": `", "x", "` has dtype ", x.scalar_type(),
                       ", expected float32, float64 or bfloat16");
  }
}

// A dense activation of a dtype that has kernels.
void check_activation(const char* op, const char* name, const Tensor& x);

// Vectors of one value a channel of x, in the dtype of its sums.
void check_vectors(
    const char* op, const Tensor& x, std::initializer_list<std::pair<const char*, const OptTensor*>> vectors);

// An activation beside x: same shape, dtype and memory order.
void check_beside(const char* op, const char* name, const OptTensor& t, const Tensor& x, const char* x_name);

// A bit mask of x.
void check_mask(const char* op, const char* name, const OptTensor& mask, const Tensor& x);

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x);

std::tuple<Tensor, Tensor> bn_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual,
    const OptTensor& res_scale, const OptTensor& res_shift, bool relu, bool save_mask);

Tensor bn_act_bwd_apply(
    const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b, const OptTensor& c, const OptTensor& residual, const OptTensor& residual_mask);

// What follows dgrad, as arguments of gradient_sums: dx += residual (under its mask), ReLU's gradient at x
// where scale is given, in place, and Σdx, Σdx·xhat(x) where mean is given.
template <class T>
GradientSums<T> after_dgrad(
    const Tensor& dx, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& mean,
    const OptTensor& rstd, const OptTensor& residual, const OptTensor& residual_mask) {
  using A = accumulate_t<T>;
  GradientSums<T> k = {};
  k.shape = shape_of(dx);
  k.out = static_cast<T*>(dx.data_ptr());
  k.dy = k.out;
  k.residual = data<T>(residual), k.residual_mask = data<uint8_t>(residual_mask);
  k.x = data<T>(x), k.scale = data<A>(scale), k.shift = data<A>(shift);
  if (mean) k.z[0] = k.x, k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(rstd);
  return k;
}

// after_dgrad over all of dx; the sums are empty where mean is not given.
std::tuple<Tensor, Tensor> finish_dgrad(
    Tensor& dx, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& mean,
    const OptTensor& rstd, const OptTensor& residual, const OptTensor& residual_mask);

}  // namespace resnet_fast::cpu
