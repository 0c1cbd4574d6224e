// The native ops on CUDA tensors: checks, allocation, dtype dispatch, streams. The kernels are in the .cu files,
// without torch. Convolutions without a CUTLASS kernel use cuDNN through ATen.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../infer_chains.h"
#include "../settings.h"
#include "../tensors.h"
#include "norm.h"
#if defined(RESNET_FAST_WITH_CUTLASS)
#include "conv.h"
#endif

namespace resnet_fast::cuda::ops {  // functions here have the names of the launchers
namespace {

using at::IntArrayRef;

void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Calls f(T{}) for the tensor's dtype T, and checks the launch error that f returns.
template <class F>
void dispatch(const char* op, const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return check_launch(op, f(float{}));
    case at::kDouble:
      return check_launch(op, f(double{}));
    case at::kBFloat16:
      return check_launch(op, f(bf16{}));
    default:
      return check_launch(op, f(fp16{}));
  }
}

template <class T>
T* out(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.data_ptr()) : nullptr;
}

// Partial results of a reduction over x: the number of splits, and their memory.
struct Partial {
  int64_t splits;
  Tensor values;
};

Partial partial_of(const char* op, const Tensor& x) {
  int processors;
  check_launch(op, multiprocessors(&processors));
  const Shape s = shape_of(x);
  const int64_t splits = reduction_splits(s, processors);
  return {splits, empty_vector(x, (4 * splits + 1) * s.channels)};
}

std::tuple<Tensor, Tensor> bn_act_unchecked(
    const char* op, const Tensor& z, const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
    const OptTensor& res_scale, const OptTensor& res_shift, bool relu, bool save_mask) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Tensor y = at::empty_like(z, z.options(), format_of(z)), mask = empty_mask(z, relu && save_mask);
  if (z.numel() == 0) return {y, mask};
  dispatch(op, z, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const BnAct<T> k = {shape_of(z),    out<T>(y),      out<uint8_t>(mask),  data<T>(z),         data<T>(residual),
                        data<A>(scale), data<A>(shift), data<A>(res_scale), data<A>(res_shift), relu};
    return cuda::bn_act(k, stream());
  });
  return {y, mask};
}

Tensor bn_act_bwd_apply_unchecked(
    const char* op, const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z,
    const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& residual) {
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor dz = at::empty_like(dy, dy.options(), format_of(dy));
  if (dy.numel() == 0) return dz;
  dispatch(op, dy, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const BnActBwdApply<T> k = {
        shape_of(dy),        out<T>(dz), data<T>(dy), data<T>(z),    data<T>(residual),
        data<uint8_t>(mask), nullptr,    data<A>(a),  data<A>(mean), data<A>(b),        data<A>(c)};
    return cuda::bn_act_bwd_apply(k, stream());
  });
  return dz;
}

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  check_bn_stats(x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return {empty_vector(x, x.size(1)).zero_(), empty_vector(x, x.size(1)).zero_()};
  const Tensor mean = empty_vector(x, x.size(1)), m2 = empty_vector(x, x.size(1));
  const Partial partial = partial_of("bn_stats", x);
  dispatch("bn_stats", x, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Statistics<T> k = {shape_of(x), data<T>(x)};
    return cuda::bn_stats(k, partial.splits, out<A>(partial.values), out<A>(mean), out<A>(m2), stream());
  });
  return {mean, m2};
}

std::tuple<Tensor, Tensor, Tensor> bn_finalize(
    const Tensor& mean, const Tensor& m2, int64_t count, const OptTensor& weight, const OptTensor& bias, double eps) {
  check_bn_finalize(mean, m2, weight, bias);
  const c10::cuda::CUDAGuard guard(mean.device());
  const auto wide = [&](const OptTensor& t) { return t ? OptTensor(t->to(mean.scalar_type())) : t; };
  const OptTensor w = wide(weight), b = wide(bias);
  const Tensor scale = at::empty_like(mean), shift = at::empty_like(mean), rstd = at::empty_like(mean);
  if (mean.numel() == 0) return {scale, shift, rstd};
  dispatch("bn_finalize", mean, [&](auto t) {
    using A = accumulate_t<decltype(t)>;
    const Finalize<A> k = {data<A>(mean),  data<A>(m2),    data<A>(w),   data<A>(b),   out<A>(scale),
                           out<A>(shift), out<A>(rstd), mean.numel(), count, eps};
    return cuda::bn_finalize(k, stream());
  });
  return {scale, shift, rstd};
}

std::tuple<Tensor, Tensor> bn_bwd_finalize(
    const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Tensor& scale, const Tensor& rstd, int64_t count) {
  check_bn_bwd_finalize(sum_dy, sum_dy_xhat, scale, rstd);
  const c10::cuda::CUDAGuard guard(sum_dy.device());
  const Tensor b = at::empty_like(sum_dy), c = at::empty_like(sum_dy);
  if (sum_dy.numel() == 0) return {b, c};
  dispatch("bn_bwd_finalize", sum_dy, [&](auto t) {
    using A = accumulate_t<decltype(t)>;
    const FinalizeGradient<A> k = {data<A>(sum_dy), data<A>(sum_dy_xhat), data<A>(scale), data<A>(rstd),
                                   out<A>(b),       out<A>(c),            sum_dy.numel(), count};
    return cuda::bn_bwd_finalize(k, stream());
  });
  return {b, c};
}

std::tuple<Tensor, Tensor> bn_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual, const OptTensor& res_scale,
    const OptTensor& res_shift, bool relu, bool save_mask) {
  check_bn_act(z, scale, shift, residual, res_scale, res_shift);
  return bn_act_unchecked("bn_act", z, scale, shift, residual, res_scale, res_shift, relu, save_mask);
}

std::tuple<Tensor, Tensor> add_relu(const Tensor& x, const Tensor& residual, bool save_mask) {
  check_add_relu(x, residual);
  return bn_act_unchecked("add_relu", x, {}, {}, residual, {}, {}, true, save_mask);
}

Tensor add_relu_bwd(const Tensor& dy, const Tensor& mask) {
  check_add_relu_bwd(dy, mask);
  return bn_act_bwd_apply_unchecked("add_relu_bwd", dy, mask, {}, {}, {}, {}, {}, {});
}

Tensor bn_act_bwd_apply(
    const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b, const OptTensor& c, const OptTensor& residual) {
  check_bn_act_bwd_apply(dy, mask, a, z, mean, b, c, residual);
  return bn_act_bwd_apply_unchecked("bn_act_bwd_apply", dy, mask, a, z, mean, b, c, residual);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_bwd_reduce(
    const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean, const Tensor& rstd,
    const OptTensor& residual, const OptTensor& res_mean, const OptTensor& res_rstd) {
  const char* op = "bn_act_bwd_reduce";
  check_bn_act_bwd_reduce(dy, mask, z, mean, rstd, residual, res_mean, res_rstd);
  const c10::cuda::CUDAGuard guard(dy.device());
  const Tensor sums[3] = {
      at::empty_like(mean), at::empty_like(mean), residual ? at::empty_like(mean) : empty_vector(dy, 0)};
  if (dy.numel() == 0) {
    for (const Tensor& sum : sums) sum.zero_();
    return {sums[0], sums[1], sums[2]};
  }
  const Partial partial = partial_of(op, dy);
  dispatch(op, dy, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    GradientSums<T> k = {};
    k.shape = shape_of(dy), k.dy = data<T>(dy), k.mask = data<uint8_t>(mask);
    k.z[0] = data<T>(z), k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(rstd);
    k.z[1] = data<T>(residual), k.mean[1] = data<A>(res_mean), k.rstd[1] = data<A>(res_rstd);
    A* const to[3] = {out<A>(sums[0]), out<A>(sums[1]), out<A>(sums[2])};
    return cuda::gradient_sums(k, partial.splits, out<A>(partial.values), to, stream());
  });
  return {sums[0], sums[1], sums[2]};
}

std::tuple<Tensor, Tensor> bn_relu_max_pool(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, IntArrayRef kernel, IntArrayRef stride,
    IntArrayRef padding, bool save_index) {
  const char* op = "bn_relu_max_pool";
  const Windows w = check_bn_relu_max_pool(z, scale, shift, kernel, stride, padding);
  const c10::cuda::CUDAGuard guard(z.device());
  const auto bytes = z.options().dtype(at::kByte);
  const Tensor y = at::empty(w.sizes(), z.options(), format_of(z));
  const Tensor index = save_index ? at::empty(w.sizes(), bytes, format_of(z)) : at::empty({0}, bytes);
  if (y.numel() == 0) return {y, index};
  dispatch(op, z, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const BnReluMaxPool<T> k = {w, out<T>(y), out<uint8_t>(index), data<T>(z), data<A>(scale), data<A>(shift)};
    return cuda::bn_relu_max_pool(k, stream());
  });
  return {y, index};
}

std::tuple<Tensor, Tensor, Tensor> max_pool_bwd(
    const Tensor& dy, const Tensor& index, const Tensor& x, const OptTensor& mean, const OptTensor& rstd,
    IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  const char* op = "max_pool_bwd";
  const Windows w = check_max_pool_bwd(dy, index, x, mean, rstd, kernel, stride, padding);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dx = at::empty_like(x, x.options(), format_of(x));
  const int64_t size = mean ? x.size(1) : 0;
  const Tensor sum_dx = empty_vector(x, size), sum_dx_xhat = empty_vector(x, size);
  if (x.numel() == 0) return {dx, sum_dx.zero_(), sum_dx_xhat.zero_()};
  const Partial partial = partial_of(op, x);
  dispatch(op, x, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    GradientSums<T> k = {};
    k.shape = w.input(), k.windows = w, k.index = data<uint8_t>(index);
    k.out = out<T>(dx), k.dy = data<T>(dy);
    if (mean) k.z[0] = data<T>(x), k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(rstd);
    A* const to[3] = {out<A>(sum_dx), out<A>(sum_dx_xhat), nullptr};
    return cuda::gradient_sums(k, partial.splits, out<A>(partial.values), to, stream());
  });
  return {dx, sum_dx, sum_dx_xhat};
}

Tensor global_avg_pool(const Tensor& x) {
  check_4d({"global_avg_pool", "x", x});
  if (x.numel() == 0 || !(x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast))) {
    return at::adaptive_avg_pool2d(x, {1, 1}).flatten(1).contiguous();  // which also raises the errors
  }
  check_floating({"global_avg_pool", "x", x});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor y = at::empty({x.size(0), x.size(1)}, x.options());
  dispatch("global_avg_pool", x, [&](auto t) {
    using T = decltype(t);
    const GlobalAvgPool<T> k = {shape_of(x), x.size(0), data<T>(x), out<T>(y)};
    return cuda::global_avg_pool(k, stream());
  });
  return y;
}

// The filters in x's dtype and memory format, as a convolution of x takes them.
Tensor filters_for(const Tensor& x, const Tensor& w) { return w.to(x.scalar_type()).contiguous(format_of(x, &w)); }

Tensor library_conv(const Tensor& x, const Tensor& w, const Geometry& g) {
  return at::conv2d(x, filters_for(x, w), {}, g.stride, g.padding, g.dilation, g.groups).contiguous(format_of(x, &w));
}

// Finishes a dgrad in place in dx: adds the residual's gradient under its mask and applies ReLU's gradient at x.
// Returns the sums for the gradient of the norm before x (empty without `mean`).
std::tuple<Tensor, Tensor> finish_dgrad(
    const Tensor& dx, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& mean,
    const OptTensor& rstd, const OptTensor& residual, const OptTensor& residual_mask) {
  const char* op = "conv_bprop";
  const int64_t channels = mean ? x.size(1) : 0;
  const Tensor sums[2] = {empty_vector(x, channels), empty_vector(x, channels)};
  if (dx.numel() == 0) return {sums[0].zero_(), sums[1].zero_()};
  if (!scale && !mean && !residual) return {sums[0], sums[1]};
  const c10::cuda::CUDAGuard guard(dx.device());
  const Partial partial = partial_of(op, dx);
  dispatch(op, dx, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    GradientSums<T> k = {};
    k.shape = shape_of(dx), k.out = out<T>(dx), k.dy = k.out;
    k.residual = data<T>(residual), k.residual_mask = data<uint8_t>(residual_mask);
    k.scale = data<A>(scale), k.shift = data<A>(shift), k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(rstd);
    if (scale || mean) k.x = data<T>(x);
    A* const to[3] = {out<A>(sums[0]), out<A>(sums[1]), nullptr};
    return cuda::gradient_sums(k, partial.splits, out<A>(partial.values), to, stream());
  });
  return {sums[0], sums[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bprop(
    const Tensor& dy, const Tensor& w, const Tensor& x, const OptTensor& dy_mask, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& in_scale,
    const OptTensor& in_shift, const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& in_act,
    const OptTensor& residual, const OptTensor& residual_mask, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, bool need_dx, bool need_dw) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const char* op = "conv_bprop";
  check_conv_bprop(
      dy, w, x, dy_mask, a, z, mean, b, c, in_scale, in_shift, in_mean, in_rstd, in_act, residual, residual_mask,
      {stride, padding, dilation, groups});
  const bool through = dy_mask || a;
  const Tensor dz = through ? bn_act_bwd_apply_unchecked(op, dy, dy_mask, a, z, mean, b, c, {}) : dy;
  Tensor h = in_act ? *in_act : x;
  if (!in_act && in_scale && need_dw) {
    h = std::get<0>(bn_act_unchecked(op, x, in_scale, in_shift, {}, {}, {}, true, false));
  }
  const auto [grad_x, grad_w, grad_b] = at::convolution_backward(
      dz, h, filters_for(x, w), at::nullopt, stride, padding, dilation, false, {0, 0}, groups,
      {need_dx, need_dw, false});
  Tensor dx = at::empty({0}, x.options()), dw = at::empty({0}, w.options());
  Tensor sum_dx = empty_vector(x, 0), sum_dx_xhat = empty_vector(x, 0);
  if (need_dw) {
    dw = grad_w.to(w.scalar_type())
             .contiguous(w.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
  }
  if (need_dx) {
    dx = grad_x.contiguous(format_of(x, &w));
    std::tie(sum_dx, sum_dx_xhat) = finish_dgrad(dx, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask);
  }
  return {dx, dw, sum_dx, sum_dx_xhat};
}

// scale and shift of a norm in inference: a slice of the tensor of all norms of a call. 0 channels: no norm and no
// bias.
struct Folded {
  Tensor all;
  int64_t channels = 0, first = 0;

  template <class A>
  const A* scale() const {
    return channels > 0 ? static_cast<const A*>(all.const_data_ptr()) + first : nullptr;
  }
  template <class A>
  const A* shift() const {
    return channels > 0 ? scale<A>() + folded_size(channels) : nullptr;
  }
  std::pair<OptTensor, OptTensor> vectors() const {
    if (channels == 0) return {};
    return {all.narrow(0, first, channels), all.narrow(0, first + folded_size(channels), channels)};
  }
};

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

// Folds all norms, kFolds of them per launch: one launch per norm would take longer than many convolutions of a
// single image.
std::vector<Folded> fold(const Tensor& x, const std::vector<BatchNorm>& norms) {
  std::vector<Folded> folded(norms.size());
  int64_t size = 0;
  for (size_t i = 0; i < norms.size(); ++i) {
    folded[i].channels = norms[i].channels(), folded[i].first = size;
    size += 2 * folded_size(folded[i].channels);
  }
  TORCH_CHECK(size <= INT32_MAX, "conv_bn_act: the norms have more than 2^30 channels in total");
  if (size == 0) return folded;
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor all = empty_vector(x, size);
  dispatch("conv_bn_act", all, [&](auto t) {
    using A = accumulate_t<decltype(t)>;
    Folds<A> k = {};
    k.results = out<A>(all);
    const auto flush = [&] {
      const cudaError_t error = cuda::fold(k, stream());
      k.count = 0;
      return error;
    };
    for (size_t i = 0; i < norms.size(); ++i) {
      if (folded[i].channels == 0) continue;
      folded[i].all = all;
      if (k.count == kFolds) {
        if (const cudaError_t error = flush()) return error;
      }
      Fold& to = k.of[k.count++];
      to.channels = int32_t(folded[i].channels), to.first = int32_t(folded[i].first), to.eps = norms[i].eps;
      const OptTensor* const from[] = {
          &norms[i].weight, &norms[i].bias, &norms[i].running_mean, &norms[i].running_var, &norms[i].conv_bias};
      for (int v = 0; v < Fold::kVectors; ++v) {
        const bool there = from[v]->has_value();
        to.vectors[v] = there ? (*from[v])->const_data_ptr() : nullptr;
        to.dtypes[v] = there ? dtype_of(**from[v]) : Dtype::kFloat;
      }
    }
    return flush();
  });
  return folded;
}

#if defined(RESNET_FAST_WITH_CUTLASS)

// Whether cuDNN convolves, by setting or because CUTLASS has no kernel for these tensors. RESNET_FAST_CUDA_CONV=cutlass
// refuses some of them before this op is called (dispatch/backends.py).
bool by_cudnn(const Tensor& x, const Tensor& w, const Geometry& g) {
  return settings().cuda_conv == "cudnn" || (x.scalar_type() != at::kBFloat16 && x.scalar_type() != at::kHalf) ||
         g.groups != 1 || format_of(x, &w) != at::MemoryFormat::ChannelsLast || w.size(0) % 8 != 0 ||
         (x.size(1) % 8 != 0 && x.size(1) > 8);
}

// Pads the stem's three channels with zeros to eight, as 16-byte accesses need.
Tensor eight_channels(const Tensor& t) {
  const auto options = t.options().memory_format(at::MemoryFormat::ChannelsLast);
  const Tensor wide = at::empty({t.size(0), 8, t.size(2), t.size(3)}, options).zero_();
  wide.narrow(1, 0, t.size(1)).copy_(t);
  return wide;
}

// relu(scale·conv(x, w) + shift + residual) in one launch, written over the residual if `over`. Returns an undefined
// tensor if the kernels do not take the shape.
Tensor fused_conv(
    const Tensor& x, const Tensor& w, const Folded& norm, const OptTensor& residual, bool relu, const Geometry& g,
    bool over) {
  const c10::cuda::CUDAGuard guard(x.device());
  const ConvShape s = conv_shape(x, w, g);
  const auto options = x.options().memory_format(at::MemoryFormat::ChannelsLast);
  const Tensor y = over ? *residual : at::empty({s.images, s.filters, s.rows, s.columns}, options);
  ConvForward k = {};
  k.dtype = dtype_of(x);
  k.x = x.const_data_ptr(), k.w = w.const_data_ptr(), k.residual = residual ? residual->const_data_ptr() : nullptr;
  k.y = y.data_ptr(), k.scale = norm.scale<float>(), k.shift = norm.shift<float>(), k.relu = relu;
  k.n = int32_t(s.images), k.h = int32_t(s.height), k.w_ = int32_t(s.width), k.c = int32_t(s.channels);
  k.k = int32_t(s.filters), k.r = int32_t(s.taps[0]), k.s = int32_t(s.taps[1]);
  k.p = int32_t(s.rows), k.q = int32_t(s.columns);
  for (int i = 0; i < 2; ++i) {
    k.stride[i] = int32_t(s.stride[i]), k.padding[i] = int32_t(s.padding[i]), k.dilation[i] = int32_t(s.dilation[i]);
  }
  int processors, major = 0, device = 0;
  check_launch("conv_bn_act", multiprocessors(&processors));
  check_launch("conv_bn_act", cudaGetDevice(&device));
  check_launch("conv_bn_act", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  const bool hopper = major == 9;
  if ((hopper ? sm90::conv_refusal(k) : sm80::conv_refusal(k)) != nullptr) return {};
  check_launch("conv_bn_act", hopper ? sm90::conv_forward(k, sm90::conv_rule(k, processors), stream())
                                     : sm80::conv_forward(k, sm80::conv_rule(k, processors), stream()));
  return y;
}

#endif

// `over`: y may overwrite the residual.
Tensor conv_bn_act_unchecked(
    const Tensor& x, const Tensor& w, const Folded& norm, const OptTensor& residual, bool relu, const Geometry& g,
    bool over) {
  const auto format = format_of(x, &w);
  const OptTensor beside = residual ? OptTensor(residual->contiguous(format)) : residual;
#if defined(RESNET_FAST_WITH_CUTLASS)
  if (x.numel() > 0 && !by_cudnn(x, w, g)) {
    const Tensor in = x.contiguous(format), filters = filters_for(x, w);
    const Tensor y = x.size(1) < 8
                         ? fused_conv(eight_channels(in), eight_channels(filters), norm, beside, relu, g, over)
                         : fused_conv(in, filters, norm, beside, relu, g, over);
    if (y.defined()) return y;
  }
#endif
  const Tensor z = library_conv(x, w, g);
  const auto [scale, shift] = norm.vectors();
  if (!scale && !beside && !relu) return z;
  return std::get<0>(bn_act_unchecked("conv_bn_act", z, scale, shift, beside, {}, {}, relu, false));
}

std::vector<Tensor> bn_fold(const Tensor& x, const c10::List<OptTensor>& vectors, at::ArrayRef<double> eps) {
  std::vector<Tensor> results;
  for (const Folded& norm : fold(x, check_bn_fold(x, vectors, eps))) {
    const auto [scale, shift] = norm.vectors();
    results.insert(results.end(), {scale->clone(), shift->clone()});  // an op's results share no memory
  }
  return results;
}

Tensor conv_bn_act(
    const Tensor& x, const Tensor& w, const OptTensor& bias, const OptTensor& bn_weight, const OptTensor& bn_bias,
    const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& residual, bool relu, double eps,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Geometry geometry = {stride, padding, dilation, groups};
  check_conv_act(x, w, residual, geometry);
  const BatchNorm norm = {bias, bn_weight, bn_bias, running_mean, running_var, eps};
  check_batch_norm(x, w.size(0), norm);
  return conv_bn_act_unchecked(x, w, fold(x, {norm})[0], residual, relu, geometry, false);
}

std::tuple<Tensor, Tensor, Tensor> conv_fprop(
    const Tensor& x, const Tensor& w, const OptTensor& in_scale, const OptTensor& in_shift, bool stats,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, const OptTensor& bias,
    const OptTensor& residual, bool relu) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Geometry g = {stride, padding, dilation, groups};
  check_conv_fprop(x, w, in_scale, in_shift, stats, bias, residual, relu, g);
  Tensor h = x;
  if (in_scale) h = std::get<0>(bn_act_unchecked("conv_fprop", x, in_scale, in_shift, {}, {}, {}, true, false));
  const BatchNorm norm = {bias, {}, {}, {}, {}, 0.0};
  const bool ends = bias || residual || relu;
  const Tensor z =
      ends ? conv_bn_act_unchecked(h, w, fold(x, {norm})[0], residual, relu, g, false) : library_conv(h, w, g);
  if (!stats) return {z, empty_vector(x, 0), empty_vector(x, 0)};
  auto [mean, m2] = bn_stats(z);
  return {z, mean, m2};
}

struct ChainOps {
  static std::vector<Folded> fold(const Tensor& x, const std::vector<BatchNorm>& norms) {
    for (const BatchNorm& norm : norms) check_batch_norm(x, norm.channels(), norm);
    return ops::fold(x, norms);
  }
  static Tensor norm_relu(const Tensor& x, const Folded& norm) {
    const auto [scale, shift] = norm.vectors();
    return std::get<0>(bn_act(x, *scale, *shift, {}, {}, {}, true, false));
  }
  static Tensor conv_bn_act(
      const Tensor& x, const Tensor& w, const Folded& norm, const OptTensor& residual, bool relu, const Geometry& g,
      bool over) {
    check_conv_act(x, w, residual, g);
    TORCH_CHECK(norm.channels == 0 || norm.channels == w.size(0), "infer_chains: `tensors`: expected norm vectors of ",
                w.size(0), " values, one per filter, got ", norm.channels);
    return conv_bn_act_unchecked(x, w, norm, residual, relu, g, over);
  }
  // In CUTLASS' epilogue the norm is free. Not measured: whether the pool applies it at less cost after cuDNN.
  static bool pool_normalizes(const Tensor&, const Tensor&, const Geometry&) { return false; }
  static Tensor norm_relu_max_pool(
      const Tensor& x, const Folded& norm, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
    const auto [scale, shift] = norm.vectors();
    return std::get<0>(bn_relu_max_pool(x, scale, shift, kernel, stride, padding, false));
  }
};

std::tuple<std::string, std::string> conv_route(
    const Tensor& x, const Tensor& w, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
    const std::string& op) {
  const bool inference = op != "conv_fprop" && op != "conv_bprop";
#if defined(RESNET_FAST_WITH_CUTLASS)
  if (inference && !by_cudnn(x, w, {stride, padding, dilation, groups})) return {"cutlass", "inference in 16 bits"};
  return {"cudnn", inference ? "RESNET_FAST_CUDA_CONV=cudnn, or CUTLASS has no kernel for it" : "training"};
#else
  return {"cudnn", "built without CUTLASS"};
#endif
}

Tensor infer_chains(const Tensor& x, const TensorList& tensors, IntArrayRef program, at::ArrayRef<double> eps) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return resnet_fast::infer_chains<ChainOps>(x, tensors, program, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("bn_stats", &bn_stats);
  m.impl("bn_finalize", &bn_finalize);
  m.impl("bn_bwd_finalize", &bn_bwd_finalize);
  m.impl("bn_act", &bn_act);
  m.impl("add_relu", &add_relu);
  m.impl("add_relu_bwd", &add_relu_bwd);
  m.impl("bn_act_bwd_reduce", &bn_act_bwd_reduce);
  m.impl("bn_act_bwd_apply", &bn_act_bwd_apply);
  m.impl("bn_relu_max_pool", &bn_relu_max_pool);
  m.impl("max_pool_bwd", &max_pool_bwd);
  m.impl("global_avg_pool", &global_avg_pool);
  m.impl("conv_fprop", &conv_fprop);
  m.impl("conv_bprop", &conv_bprop);
  m.impl("bn_fold", &bn_fold);
  m.impl("conv_bn_act", &conv_bn_act);
  m.impl("conv_route", &conv_route);
  m.impl("infer_chains", &infer_chains);
}

}  // namespace resnet_fast::cuda::ops
