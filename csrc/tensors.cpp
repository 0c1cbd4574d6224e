#include "tensors.h"

#include <initializer_list>
#include <utility>

#include "checks.h"

namespace resnet_fast {

Shape shape_of(const Tensor& x) {
  const bool nhwc = x.numel() > 0 && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t n = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
  return nhwc ? Shape{n * pixels, c, c, true} : Shape{n * c, pixels, c, false};
}

at::MemoryFormat format_of(const Tensor& x, const Tensor* weight) {
  const bool nhwc = x.is_contiguous(at::MemoryFormat::ChannelsLast), nchw = x.is_contiguous();
  const auto pick = [](bool last) { return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous; };
  if (nhwc != nchw) return pick(nhwc);
  // Both fit: strides decide where there is one channel, as in PyTorch.
  const auto one = [](const Tensor& t) { return t.size(1) == 1 && t.stride(1) == 1 && t.size(2) * t.size(3) > 1; };
  return pick(one(x) || (weight != nullptr && weight->is_contiguous(at::MemoryFormat::ChannelsLast) &&
                         (!weight->is_contiguous() || one(*weight))));
}

at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor empty_mask(const Tensor& x, bool wanted) {
  const Shape s = shape_of(x);
  const auto options = x.options().dtype(at::kByte);
  return wanted ? at::empty({s.rows, (s.inner + 7) / 8}, options) : at::empty({0}, options);
}

Tensor empty_vector(const Tensor& x, int64_t size) { return at::empty({size}, x.options().dtype(accumulate_type(x))); }

ConvShape conv_shape(const Tensor& x, const Tensor& w, const Geometry& g) {
  ConvShape s = {x.size(0), x.size(2), x.size(3), x.size(1), 0, 0, w.size(0), {}, {}, {}, {}, g.groups};
  for (int i = 0; i < 2; ++i) {
    s.taps[i] = w.size(2 + i), s.stride[i] = g.stride[i], s.padding[i] = g.padding[i], s.dilation[i] = g.dilation[i];
    const int64_t reach = s.dilation[i] * (s.taps[i] - 1) + 1, padded = x.size(2 + i) + 2 * s.padding[i];
    (i == 0 ? s.rows : s.columns) = padded < reach ? 0 : (padded - reach) / s.stride[i] + 1;
  }
  return s;
}

namespace {

using Named = std::pair<const char*, const Tensor*>;

Named named(const char* name, const Tensor& t) { return {name, &t}; }
Named named(const char* name, const OptTensor& t) { return {name, t ? &*t : nullptr}; }

void check_activation(const char* op, const char* name, const Tensor& x) {
  check_dense_4d({op, name, x});
  if (x.is_cuda()) {
    check_floating({op, name, x});
  } else {
    check_dtype({op, name, x}, {at::kFloat, at::kDouble, at::kBFloat16});
  }
}

// Vectors of one value per channel of x, in x's accumulation dtype.
void check_vectors(const char* op, const Named& x, std::initializer_list<Named> vectors) {
  for (const auto& [name, vector] : vectors) {
    if (vector == nullptr) continue;
    check_channels({op, name, *vector}, x.second->size(1));
    check_accumulate_dtype({op, name, *vector}, x.second->scalar_type());
    check_same_device({op, name, *vector}, {op, x.first, *x.second});
  }
}

// Contiguous matrices [N,C] of one value per image and channel of x, in x's accumulation dtype.
void check_matrices(const char* op, const Named& x, std::initializer_list<Named> matrices) {
  for (const auto& [name, matrix] : matrices) {
    if (matrix == nullptr) continue;
    check_shape({op, name, *matrix}, x.second->sizes().slice(0, 2));
    TORCH_CHECK(matrix->is_contiguous(), op, ": `", name, "` has strides ", matrix->strides(),
                ", expected contiguous memory");
    check_accumulate_dtype({op, name, *matrix}, x.second->scalar_type());
    check_same_device({op, name, *matrix}, {op, x.first, *x.second});
  }
}

// An activation that is read with x: same shape, dtype, device and memory format.
void check_beside(const char* op, const Named& x, const Named& beside) {
  const auto& [name, t] = beside;
  if (t == nullptr) return;
  check_like({op, name, *t}, {op, x.first, *x.second});
  TORCH_CHECK(shape_of(*t).nhwc == shape_of(*x.second).nhwc && t->is_non_overlapping_and_dense(), op, ": `", name,
              "` has strides ", t->strides(), ", expected the memory format of `", x.first, "`, whose strides are ",
              x.second->strides());
}

// A bit mask of x.
void check_mask(const char* op, const Named& x, const Named& mask) {
  const auto& [name, t] = mask;
  if (t == nullptr) return;
  const Shape s = shape_of(*x.second);
  check_dtype({op, name, *t}, {at::kByte});
  check_shape({op, name, *t}, {s.rows, (s.inner + 7) / 8});
  check_same_device({op, name, *t}, {op, x.first, *x.second});
}

// Checks shapes, dtypes and geometry of a convolution; returns the output's shape [N,K,P,Q].
std::vector<int64_t> check_conv(const char* op, const Tensor& x, const Tensor& w, const Geometry& g) {
  check_activation(op, "x", x);
  check_4d({op, "w", w});
  check_same_device({op, "w", w}, {op, "x", x});
  TORCH_CHECK(g.stride.size() == 2 && g.padding.size() == 2 && g.dilation.size() == 2, op,
              ": `stride`, `padding` and `dilation` have ", g.stride.size(), ", ", g.padding.size(), " and ",
              g.dilation.size(), " values, expected 2 each");
  for (int i = 0; i < 2; ++i) {
    constexpr int64_t kMost = int64_t(1) << 30;  // sums and products of two of them, or with a size, fit int64
    TORCH_CHECK(g.stride[i] >= 1 && g.dilation[i] >= 1 && g.padding[i] >= 0 && g.stride[i] <= kMost &&
                    g.dilation[i] <= kMost && g.padding[i] <= kMost,
                op, ": `stride`, `dilation` and `padding` are ", g.stride, ", ", g.dilation, " and ", g.padding,
                ", expected `stride` and `dilation` from 1 to 2^30, `padding` from 0 to 2^30");
  }
  TORCH_CHECK(g.groups >= 1 && w.size(0) % g.groups == 0 && w.size(1) * g.groups == x.size(1), op,
              ": `w` has shape ", w.sizes(), ", expected [K, C / groups, R, S], where C is ", x.size(1),
              " and `groups`, ", g.groups, ", divides C and K");
  TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type() || w.scalar_type() == at::kFloat, op, ": `w` has dtype ",
                   dtype_name(w.scalar_type()), ", expected ", dtype_name(x.scalar_type()), " or float32");
  const ConvShape s = conv_shape(x, w, g);
  TORCH_CHECK(s.rows >= 1 && s.columns >= 1, op, ": `x` has shape ", x.sizes(), ", too few pixels for `w` of shape ",
              w.sizes(), ", `padding` ", g.padding, " and `dilation` ", g.dilation);
  return {s.images, s.filters, s.rows, s.columns};
}

Windows check_windows(
    const char* op, const Named& named_x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const auto& [name, t] = named_x;
  const Tensor& x = *t;
  Windows w = {x.size(0), x.size(1), x.size(2), x.size(3), 0, 0, {}, {}, {}, false};
  w.nhwc = format_of(x) == at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
              ": `kernel`, `stride` and `padding` have ", kernel.size(), ", ", stride.size(), " and ", padding.size(),
              " values, expected 2 each");
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(x.size(2 + i) < int64_t(1) << 30, op, ": `", name, "` has shape ", x.sizes(),
                ", expected fewer than 2^30 rows and columns");
    w.kernel[i] = kernel[i], w.stride[i] = stride[i], w.padding[i] = padding[i];
    TORCH_CHECK(kernel[i] >= 1 && kernel[i] <= kNoPosition && stride[i] >= 1, op, ": `kernel` and `stride` are ",
                kernel, " and ", stride, ", expected at least 1, and `kernel` at most ", kNoPosition);
    TORCH_CHECK(padding[i] >= 0 && 2 * padding[i] <= kernel[i], op, ": `padding` is ", padding,
                ", expected at least 0 and at most half of `kernel`, ", kernel);
    (i == 0 ? w.rows : w.columns) = (x.size(2 + i) + 2 * padding[i] - kernel[i]) / stride[i] + 1;
    TORCH_CHECK(x.size(2 + i) + 2 * padding[i] >= kernel[i], op, ": `", name, "` has shape ", x.sizes(),
                ", too few pixels for `kernel` ", kernel, " and `padding` ", padding);
  }
  TORCH_CHECK(kernel[0] * kernel[1] <= kNoPosition, op, ": `kernel` is ", kernel, ", expected at most ",
              kNoPosition, " positions");
  return w;
}

void check_through_norm(
    const char* op, const Named& dy, const OptTensor& mask, const char* mask_name, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c) {
  check_mask(op, dy, named(mask_name, mask));
  check_beside(op, dy, named("z", z));
  check_vectors(op, dy, {named("a", a), named("mean", mean), named("b", b), named("c", c)});
  TORCH_CHECK(!b || (a && z && mean && c), op, ": `a`, `z`, `mean` or `c` is missing; `b` requires them");
}

}  // namespace

void check_bn_stats(const Tensor& x) { check_activation("bn_stats", "x", x); }

void check_image_stats(const Tensor& x) { check_activation("image_stats", "x", x); }

void check_gated_act(const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual) {
  const char* op = "gated_act";
  const Named x = named("z", z);
  check_activation(op, "z", z);
  check_matrices(op, x, {named("scale", scale), named("shift", shift)});
  check_beside(op, x, named("residual", residual));
}

void check_gated_act_bwd_reduce(const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean) {
  const char* op = "gated_act_bwd_reduce";
  const Named x = named("dy", dy);
  check_activation(op, "dy", dy);
  check_mask(op, x, named("mask", mask));
  check_beside(op, x, named("z", z));
  check_matrices(op, x, {named("mean", mean)});
}

void check_gated_act_bwd_apply(
    const Tensor& dy, const Tensor& scale, const Tensor& shift, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b) {
  const char* op = "gated_act_bwd_apply";
  const Named x = named("dy", dy);
  check_activation(op, "dy", dy);
  check_matrices(op, x, {named("scale", scale), named("shift", shift), named("mean", mean), named("b", b)});
  check_beside(op, x, named("z", z));
  check_together(op, {{"z", &z}, {"mean", &mean}, {"b", &b}});
}

void check_bn_finalize(const Tensor& mean, const Tensor& m2, const OptTensor& weight, const OptTensor& bias) {
  const char* op = "bn_finalize";
  const int64_t channels = mean.numel();
  check_channels({op, "mean", mean}, channels);
  check_dtype({op, "mean", mean}, {at::kFloat, at::kDouble});
  check_channels({op, "m2", m2}, channels);
  check_same_dtype({op, "m2", m2}, {op, "mean", mean});
  check_same_device({op, "m2", m2}, {op, "mean", mean});
  for (const auto& [name, t] : {named("weight", weight), named("bias", bias)}) {
    if (t == nullptr) continue;
    check_floating({op, name, *t});
    check_channels({op, name, *t}, channels);
    check_same_device({op, name, *t}, {op, "mean", mean});
  }
}

void check_bn_bwd_finalize(
    const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Tensor& scale, const Tensor& rstd) {
  const char* op = "bn_bwd_finalize";
  const int64_t channels = sum_dy.numel();
  check_channels({op, "sum_dy", sum_dy}, channels);
  check_dtype({op, "sum_dy", sum_dy}, {at::kFloat, at::kDouble});
  for (const auto& [name, t] :
       {named("sum_dy_xhat", sum_dy_xhat), named("scale", scale), named("rstd", rstd)}) {
    check_channels({op, name, *t}, channels);
    check_same_dtype({op, name, *t}, {op, "sum_dy", sum_dy});
    check_same_device({op, name, *t}, {op, "sum_dy", sum_dy});
  }
}

void check_bn_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual, const OptTensor& res_scale,
    const OptTensor& res_shift) {
  const char* op = "bn_act";
  const Named x = named("z", z);
  check_activation(op, "z", z);
  check_vectors(op, x, {named("scale", scale), named("shift", shift), named("res_scale", res_scale),
                        named("res_shift", res_shift)});
  check_beside(op, x, named("residual", residual));
  check_together(op, {{"res_scale", &res_scale}, {"res_shift", &res_shift}});
  TORCH_CHECK(!res_scale || residual, op, ": `residual` is missing; `res_scale` requires it");
}

void check_add_relu(const Tensor& x, const Tensor& residual) {
  check_activation("add_relu", "x", x);
  check_beside("add_relu", named("x", x), named("residual", residual));
}

void check_add_relu_bwd(const Tensor& dy, const Tensor& mask) {
  check_activation("add_relu_bwd", "dy", dy);
  check_mask("add_relu_bwd", named("dy", dy), named("mask", mask));
}

void check_bn_act_bwd_reduce(
    const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean, const Tensor& rstd,
    const OptTensor& residual, const OptTensor& res_mean, const OptTensor& res_rstd) {
  const char* op = "bn_act_bwd_reduce";
  const Named x = named("dy", dy);
  check_activation(op, "dy", dy);
  check_mask(op, x, named("mask", mask));
  check_beside(op, x, named("z", z));
  check_beside(op, x, named("residual", residual));
  check_together(op, {{"residual", &residual}, {"res_mean", &res_mean}, {"res_rstd", &res_rstd}});
  check_vectors(op, x, {named("mean", mean), named("rstd", rstd), named("res_mean", res_mean),
                        named("res_rstd", res_rstd)});
}

void check_bn_act_bwd_apply(
    const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b, const OptTensor& c, const OptTensor& residual) {
  const char* op = "bn_act_bwd_apply";
  check_activation(op, "dy", dy);
  check_through_norm(op, named("dy", dy), mask, "mask", a, z, mean, b, c);
  check_beside(op, named("dy", dy), named("residual", residual));
}

Windows check_bn_relu_max_pool(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef padding) {
  const char* op = "bn_relu_max_pool";
  check_activation(op, "z", z);
  check_together(op, {{"scale", &scale}, {"shift", &shift}});
  check_vectors(op, named("z", z), {named("scale", scale), named("shift", shift)});
  return check_windows(op, named("z", z), kernel, stride, padding);
}

Windows check_max_pool_bwd(
    const Tensor& dy, const Tensor& index, const Tensor& x, const OptTensor& mean, const OptTensor& rstd,
    at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const char* op = "max_pool_bwd";
  check_activation(op, "x", x);
  const Windows w = check_windows(op, named("x", x), kernel, stride, padding);
  const auto format = w.nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  check_same_dtype({op, "dy", dy}, {op, "x", x});
  check_dtype({op, "index", index}, {at::kByte});
  for (const auto& [name, t] : {named("dy", dy), named("index", index)}) {
    check_shape({op, name, *t}, w.sizes());
    check_same_device({op, name, *t}, {op, "x", x});
    TORCH_CHECK(t->is_contiguous(format), op, ": `", name, "` has strides ", t->strides(),
                ", expected the memory format of `x`, whose strides are ", x.strides());
  }
  check_together(op, {{"mean", &mean}, {"rstd", &rstd}});
  check_vectors(op, named("x", x), {named("mean", mean), named("rstd", rstd)});
  return w;
}

void check_conv_fprop(
    const Tensor& x, const Tensor& w, const OptTensor& in_scale, const OptTensor& in_shift, bool stats,
    const OptTensor& bias, const OptTensor& residual, bool relu, const Geometry& g) {
  const char* op = "conv_fprop";
  check_conv_act(x, w, residual, g, op);
  check_vectors(op, named("x", x), {named("in_scale", in_scale), named("in_shift", in_shift)});
  check_together(op, {{"in_scale", &in_scale}, {"in_shift", &in_shift}});
  check_batch_norm(x, w.size(0), {bias, {}, {}, {}, {}, 0.0}, op);
  TORCH_CHECK_VALUE(!stats || !(bias || residual || relu), op,
                    ": `stats`: expected False with a bias, a residual or a ReLU");
}

void check_conv_bprop(
    const Tensor& dy, const Tensor& w, const Tensor& x, const OptTensor& dy_mask, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& in_scale,
    const OptTensor& in_shift, const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& in_act,
    const OptTensor& residual, const OptTensor& residual_mask, const Geometry& g) {
  const char* op = "conv_bprop";
  const std::vector<int64_t> output = check_conv(op, x, w, g);
  check_activation(op, "dy", dy);
  check_shape({op, "dy", dy}, output);
  check_same_dtype({op, "dy", dy}, {op, "x", x});
  check_same_device({op, "dy", dy}, {op, "x", x});
  check_through_norm(op, named("dy", dy), dy_mask, "dy_mask", a, z, mean, b, c);
  check_vectors(op, named("x", x), {named("in_scale", in_scale), named("in_shift", in_shift),
                                    named("in_mean", in_mean), named("in_rstd", in_rstd)});
  check_together(op, {{"in_scale", &in_scale}, {"in_shift", &in_shift}});
  check_together(op, {{"in_mean", &in_mean}, {"in_rstd", &in_rstd}});
  check_beside(op, named("x", x), named("in_act", in_act));
  check_beside(op, named("x", x), named("residual", residual));
  check_mask(op, named("x", x), named("residual_mask", residual_mask));
}

void check_batch_norm(const Tensor& x, int64_t channels, const BatchNorm& norm, const char* op) {
  for (const auto& [name, vector] :
       {named("bias", norm.conv_bias), named("bn_weight", norm.weight), named("bn_bias", norm.bias),
        named("running_mean", norm.running_mean), named("running_var", norm.running_var)}) {
    if (vector == nullptr) continue;
    check_channels({op, name, *vector}, channels);
    check_floating({op, name, *vector});
    check_same_device({op, name, *vector}, {op, "x", x});
  }
  check_together(op, {{"running_mean", &norm.running_mean}, {"running_var", &norm.running_var}});
}

std::vector<BatchNorm> check_bn_fold(
    const Tensor& x, const c10::List<OptTensor>& vectors, at::ArrayRef<double> eps) {
  TORCH_CHECK_VALUE(vectors.size() == 5 * eps.size(), "bn_fold: vectors: expected ", 5 * eps.size(),
                    " entries, five per entry of eps, got ", vectors.size());
  std::vector<BatchNorm> norms(eps.size());
  for (size_t i = 0; i < norms.size(); ++i) {
    BatchNorm& norm = norms[i];
    size_t at = 5 * i;
    for (OptTensor* t : {&norm.conv_bias, &norm.weight, &norm.bias, &norm.running_mean, &norm.running_var}) {
      *t = vectors.get(at++);
    }
    norm.eps = eps[i];
    TORCH_CHECK_VALUE(norm.channels() > 0, "bn_fold: vectors: expected a vector of norm ", i, ", got only None");
    check_batch_norm(x, norm.channels(), norm, "bn_fold");
  }
  return norms;
}

void check_conv_act(
    const Tensor& x, const Tensor& w, const OptTensor& residual, const Geometry& g, const char* op) {
  const std::vector<int64_t> output = check_conv(op, x, w, g);
  if (!residual) return;
  check_shape({op, "residual", *residual}, output);
  check_same_dtype({op, "residual", *residual}, {op, "x", x});
  check_same_device({op, "residual", *residual}, {op, "x", x});
}

}  // namespace resnet_fast
