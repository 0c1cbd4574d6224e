// The memory-bound ops on CPU tensors, for the op registrations (norm.cpp) and the convolutions.
#pragma once

#include <ATen/ATen.h>

#include <tuple>
#include <utility>

#include "../tensors.h"
#include "kernels.h"

namespace resnet_fast::cpu {

// Calls f(T{}) with T = float, double or bf16 for the tensor's dtype.
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

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x);

std::tuple<Tensor, Tensor, Tensor> bn_finalize(
    const Tensor& mean, const Tensor& m2, int64_t count, const OptTensor& weight, const OptTensor& bias, double eps);

// scale and shift such that scale·x + shift is the norm of x + conv_bias; without running statistics that is
// weight·(x + conv_bias) + bias. In x's accumulation dtype; empty without any vector.
std::pair<OptTensor, OptTensor> scale_and_shift(const Tensor& x, const BatchNorm& norm);

std::tuple<Tensor, Tensor> bn_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual,
    const OptTensor& res_scale, const OptTensor& res_shift, bool relu, bool save_mask);

// bn_act in place, unchecked; missing operands are skipped. The residual must have z's memory format.
void bn_act_over(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, const OptTensor& residual, bool relu);

std::tuple<Tensor, Tensor> bn_relu_max_pool(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef padding, bool save_index);

Tensor bn_act_bwd_apply(
    const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b, const OptTensor& c, const OptTensor& residual, const OptTensor& residual_mask);

// The arguments of gradient_sums that finish a dgrad in place: dx += residual (under its mask); ReLU's gradient at x
// if scale is given; Σdx and Σdx·xhat(x) if mean is given.
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

// Applies after_dgrad to all of dx; the sums are empty without mean.
std::tuple<Tensor, Tensor> finish_dgrad(
    Tensor& dx, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& mean,
    const OptTensor& rstd, const OptTensor& residual, const OptTensor& residual_mask);

}  // namespace resnet_fast::cpu
