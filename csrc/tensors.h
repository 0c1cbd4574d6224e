// Shapes, memory formats and pointers of tensors for the native kernels of every device, and the checks of each
// op's operands (errors: checks.h).
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "kernel_args.h"

namespace resnet_fast {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Rows and elements of a dense 4-D tensor, as in resnet_fast/spec/layout.py.
Shape shape_of(const Tensor& x);

// The memory format of results computed from x (and a filter), as resnet_fast/spec/layout.py's memory_format.
at::MemoryFormat format_of(const Tensor& x, const Tensor* weight = nullptr);

at::ScalarType accumulate_type(const Tensor& x);

// A bit mask of x in its memory order, one row of bytes per row of x; empty unless wanted.
Tensor empty_mask(const Tensor& x, bool wanted);

// `size` values of x's accumulation dtype.
Tensor empty_vector(const Tensor& x, int64_t size);

// Data of an optional operand, nullptr if it is missing.
template <class T>
const T* data(const OptTensor& t) {
  return t.has_value() && t->numel() > 0 ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

struct Geometry {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// The tensors of a BatchNorm in inference, and the bias of the convolution before it; each may be missing.
struct BatchNorm {
  OptTensor conv_bias, weight, bias, running_mean, running_var;
  double eps;

  int64_t channels() const {  // 0 without a norm and a bias
    for (const OptTensor* t : {&running_mean, &conv_bias, &weight, &bias}) {
      if (t->has_value()) return (*t)->numel();
    }
    return 0;
  }
};

ConvShape conv_shape(const Tensor& x, const Tensor& w, const Geometry& geometry);

// One function per op; it raises for the first invalid operand. Activations must be dense, in a dtype that the
// device has kernels for; vectors have one value per channel, in the activations' accumulation dtype.
void check_bn_stats(const Tensor& x);
void check_image_stats(const Tensor& x);
void check_gated_act(const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual);
void check_gated_act_bwd_reduce(const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean);
void check_gated_act_bwd_apply(
    const Tensor& dy, const Tensor& scale, const Tensor& shift, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b);
void check_bn_finalize(const Tensor& mean, const Tensor& m2, const OptTensor& weight, const OptTensor& bias);
// The norms in `vectors`: conv_bias, weight, bias, running mean and variance of each, checked against x.
std::vector<BatchNorm> check_bn_fold(const Tensor& x, const c10::List<OptTensor>& vectors, at::ArrayRef<double> eps);
void check_bn_bwd_finalize(
    const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Tensor& scale, const Tensor& rstd);
void check_bn_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual, const OptTensor& res_scale,
    const OptTensor& res_shift);
void check_add_relu(const Tensor& x, const Tensor& residual);
void check_add_relu_bwd(const Tensor& dy, const Tensor& mask);
void check_bn_act_bwd_reduce(
    const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean, const Tensor& rstd,
    const OptTensor& residual, const OptTensor& res_mean, const OptTensor& res_rstd);
void check_bn_act_bwd_apply(
    const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b, const OptTensor& c, const OptTensor& residual);
Windows check_bn_relu_max_pool(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef padding);
Windows check_max_pool_bwd(
    const Tensor& dy, const Tensor& index, const Tensor& x, const OptTensor& mean, const OptTensor& rstd,
    at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding);
void check_conv_fprop(
    const Tensor& x, const Tensor& w, const OptTensor& in_scale, const OptTensor& in_shift, bool stats,
    const OptTensor& bias, const OptTensor& residual, bool relu, const Geometry& geometry);
void check_conv_bprop(
    const Tensor& dy, const Tensor& w, const Tensor& x, const OptTensor& dy_mask, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& in_scale,
    const OptTensor& in_shift, const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& in_act,
    const OptTensor& residual, const OptTensor& residual_mask, const Geometry& geometry);
// conv_bn_act has two: one for its vectors, one for its convolution.
void check_batch_norm(
    const Tensor& x, int64_t channels, const BatchNorm& norm, const char* op = "conv_bn_act");
void check_conv_act(
    const Tensor& x, const Tensor& w, const OptTensor& residual, const Geometry& geometry,
    const char* op = "conv_bn_act");

}  // namespace resnet_fast
