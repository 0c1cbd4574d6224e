// The convolution ops on CPU tensors. The convolutions themselves are oneDNN's, through ATen; what
// surrounds them in a chain (prologue, statistics, gradients of BN and ReLU) is norm.cpp's, in as few
// passes as separate convolutions allow.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "../checks.h"
#include "norm.h"
#include "packed.h"

namespace resnet_fast::cpu {
namespace {

using at::IntArrayRef;

// relu(scale·x + shift), the input of a convolution that has a norm before it.
Tensor activate(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  return std::get<0>(bn_act(x, scale, shift, {}, {}, {}, true, false));
}

void check_conv(const char* op, const Tensor& x, const Tensor& w) {
  check_dense_4d({op, "x", x});
  check_4d({op, "w", w});
  check_dtype({op, "x", x}, {at::kFloat, at::kDouble, at::kBFloat16});
  TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type() || w.scalar_type() == at::kFloat, op, ": `w` has dtype ",
                   dtype_name(w.scalar_type()), ", expected ", dtype_name(x.scalar_type()), " or float32");
}

std::tuple<Tensor, Tensor, Tensor> conv_fprop(
    const Tensor& x, const Tensor& w, const OptTensor& in_scale, const OptTensor& in_shift, bool stats,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_conv("conv_fprop", x, w);
  const Tensor h = in_scale ? activate(x, *in_scale, *in_shift) : x;
  const Tensor z = at::conv2d(h, w.to(x.scalar_type()), {}, stride, padding, dilation, groups)
                       .contiguous(format_of(x, &w));
  if (stats) {
    auto [mean, m2] = bn_stats(z);
    return {z, mean, m2};
  }
  const auto options = x.options().dtype(accumulate_type(x));
  return {z, at::empty({0}, options), at::empty({0}, options)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bprop(
    const Tensor& dy, const Tensor& w, const Tensor& x, const OptTensor& dy_mask, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& in_scale,
    const OptTensor& in_shift, const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& in_act,
    const OptTensor& residual, const OptTensor& residual_mask, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, bool need_dx, bool need_dw) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_conv("conv_bprop", x, w);
  const Tensor dz = dy_mask || a ? bn_act_bwd_apply(dy, dy_mask, a, z, mean, b, c, {}, {}) : dy;
  const Tensor h = !need_dw || !in_scale ? x : in_act ? *in_act : activate(x, *in_scale, *in_shift);
  auto [dx, dw, db] = at::convolution_backward(
      dz, in_act ? *in_act : h, w.to(x.scalar_type()), at::nullopt, stride, padding, dilation, false, {0, 0}, groups,
      {need_dx, need_dw, false});
  dw = need_dw ? dw.to(w.scalar_type()) : at::empty({0}, w.options());
  const auto options = x.options().dtype(accumulate_type(x));
  if (!need_dx) return {at::empty({0}, x.options()), dw, at::empty({0}, options), at::empty({0}, options)};
  dx = dx.contiguous(format_of(x, &w));
  auto [sum_dx, sum_dx_xhat] = finish_dgrad(dx, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask);
  return {dx, dw, sum_dx, sum_dx_xhat};
}

Tensor conv_bn_act(
    const Tensor& x, const Tensor& w, const OptTensor& bias, const OptTensor& bn_weight, const OptTensor& bn_bias,
    const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& residual, bool relu, double eps,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_conv("conv_bn_act", x, w);
  const BatchNormTensors bn = {bias, bn_weight, bn_bias, running_mean, running_var, eps};
  const Geometry geometry = {stride, padding, dilation, groups};
  const PackedConv packed = pack(x, w, bn, geometry);
  const Tensor y = run_packed(x, packed, residual, relu, geometry);
  return y.contiguous(format_of(x, &w));
}

}  // namespace

TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("conv_fprop", &conv_fprop);
  m.impl("conv_bprop", &conv_bprop);
  m.impl("conv_bn_act", &conv_bn_act);
}

}  // namespace resnet_fast::cpu
