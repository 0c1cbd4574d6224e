// The convolution ops on CPU tensors. Where resnet_fast's tiles take the shape (tiled_conv.h), prologue and epilogue
// run band by band while the data is in cache. Otherwise oneDNN convolves through ATen, and norm.cpp's kernels run
// before and after.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../infer_chains.h"
#include "memory.h"
#include "norm.h"
#include "packed_filters.h"
#include "tiled_conv.h"

namespace resnet_fast::cpu {
namespace {

using at::IntArrayRef;

// relu(scale·x + shift), the input of a convolution after a norm.
Tensor activate(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  return std::get<0>(bn_act(x, scale, shift, {}, {}, {}, true, false));
}

// The prologue of tiled_conv.h's bands: relu(scale·x + shift) of a range of pixels of NHWC x; empty without a norm.
template <class T>
FillRow<T> prologue(const ConvShape& s, const Tensor& x, const OptTensor& scale, const OptTensor& shift) {
  if (!scale) return {};
  const T* from = data<T>(x);
  const auto *a = data<float>(scale), *b = data<float>(shift);
  return [=](int64_t image, int64_t row, int64_t begin, int64_t end, T* to) {
    const int64_t first = (image * s.height + row) * s.width + begin;
    BnAct<T> k = {};
    k.shape = {end - begin, s.channels, s.channels, true};
    k.y = to, k.z = from + first * s.channels, k.scale = a, k.shift = b, k.relu = true;
    kernels<T>().bn_act(k, 0, end - begin);
  };
}

// Batch statistics, band by band: each task merges its bands; then the tasks' results are merged in order.
template <class T>
class BandStatistics {
 public:
  BandStatistics(const Statistics<T>& k)
      : k_(k), channels_(k.shape.inner), counts_(kTasks, 0.0), moments_(kTasks) {}

  void add(int64_t task, int64_t begin, int64_t end) {
    thread_local std::vector<double> part;
    part.resize(2 * channels_);
    for (int64_t last; begin < end; begin = last) {
      last = std::min(end, begin + kStatisticsRows);
      kernels<T>().statistics(k_, begin, last, 1, part.data());
      merge_into(task, double(last - begin), part.data());
    }
  }

  std::tuple<Tensor, Tensor> result(const Tensor& x) {
    for (int64_t task = 1; task < kTasks; ++task) merge_into(0, counts_[task], moments_[task].data());
    Tensor mean = empty_vector(x, channels_), m2 = empty_vector(x, channels_);
    std::copy_n(moments_[0].data(), channels_, mean.data_ptr<float>());
    std::copy_n(moments_[0].data() + channels_, channels_, m2.data_ptr<float>());
    return {mean, m2};
  }

 private:
  void merge_into(int64_t task, double count, const double* part) {
    if (count == 0) return;
    moments_[task].resize(2 * channels_);
    double *mean = moments_[task].data(), *m2 = mean + channels_;
    const double total = counts_[task] + count, share = count / total, weight = counts_[task] * share;
    for (int64_t c = 0; c < channels_; ++c) {  // math.h's merge(), with the terms of the counts computed once
      const double delta = part[c] - mean[c];
      mean[c] = moved(mean[c], delta * share, part[c]);
      m2[c] += part[channels_ + c] + delta * delta * weight;
    }
    counts_[task] = total;
  }

  Statistics<T> k_;
  int64_t channels_;
  std::vector<double> counts_;
  std::vector<std::vector<double>> moments_;  // of each task: means, then m2s
};

using Three = std::tuple<Tensor, Tensor, Tensor>;

// What follows a convolution without a norm: relu(scale·z + shift + residual), where scale is 1 and shift the bias.
struct End {
  OptTensor scale, shift, residual;
  bool relu;

  explicit operator bool() const { return scale || residual || relu; }
};

// Empty if the tiles cannot convolve these values (tiled_conv_fprop).
template <class T>
std::optional<Three> tiled_fprop(
    const Tensor& x, const Tensor& w, const OptTensor& in_scale, const OptTensor& in_shift, bool stats, const End& end,
    const Geometry& g) {
  const ConvShape s = conv_shape(x, w, g);
  const Tensor z = empty({s.images, s.filters, s.rows, s.columns}, x.options(), at::MemoryFormat::ChannelsLast);
  T* to = static_cast<T*>(z.data_ptr());
  BandStatistics<T> statistics({shape_of(z), to});
  const Finish finish = [&](int64_t task, int64_t begin, int64_t end) { statistics.add(task, begin, end); };
  const bool done = tiled_conv_fprop<T>(
      s, in_scale ? nullptr : data<T>(x), prologue<T>(s, x, in_scale, in_shift), pack_filters<T>(s, w, false),
      data<float>(end.scale), data<float>(end.shift), data<T>(end.residual), end.relu, to, stats ? finish : Finish());
  if (!done) return {};
  if (!stats) return Three{z, empty_vector(x, 0), empty_vector(x, 0)};
  auto [mean, m2] = statistics.result(x);
  return Three{z, mean, m2};
}

Three conv_fprop(
    const Tensor& x, const Tensor& w, const OptTensor& in_scale, const OptTensor& in_shift, bool stats,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, const OptTensor& bias,
    const OptTensor& residual, bool relu) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Geometry g = {stride, padding, dilation, groups};
  check_conv_fprop(x, w, in_scale, in_shift, stats, bias, residual, relu, g);
  const auto format = format_of(x, &w);
  const auto [scale, shift] = scale_and_shift(x, {bias, {}, {}, {}, {}, 0.0});
  const End end = {scale, shift, residual ? OptTensor(residual->contiguous(format)) : residual, relu};
  const bool tiled = route(x, w, g, Use::kForward).tiled;
  const auto by_tiles = x.scalar_type() == at::kFloat ? tiled_fprop<float> : tiled_fprop<bf16>;
  if (tiled && groups == 1) {
    if (auto found = by_tiles(x, w, in_scale, in_shift, stats, end, g)) return *found;
  }
  const Tensor h = in_scale ? activate(x, *in_scale, *in_shift) : x;
  if (tiled && groups > 1) {
    if (auto found = by_tiles(h, w, {}, {}, stats, end, g)) return *found;
  }
  const Tensor z = conv2d(h, w.to(x.scalar_type()), g).contiguous(format);
  if (end) bn_act_over(z, end.scale, end.shift, end.residual, relu);
  if (!stats) return {z, empty_vector(x, 0), empty_vector(x, 0)};
  auto [mean, m2] = bn_stats(z);
  return {z, mean, m2};
}

// dz, the gradient through the norm after a convolution (bn_act_bwd_apply).
template <class T>
struct OutputGradient {
  Tensor dz;
  FillRow<T> fill;  // completes pixels of dz in place; empty where dz is complete
};

// A pointwise convolution reads each pixel of dz once, so dgrad computes dz band by band. Other convolutions read
// each pixel several times, so dz is computed before.
template <class T>
OutputGradient<T> output_gradient(
    const ConvShape& s, bool need_dx, const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z,
    const OptTensor& mean, const OptTensor& b, const OptTensor& c) {
  if (!mask && !a) return {dy, {}};
  if (!s.pointwise() || !need_dx) return {bn_act_bwd_apply(dy, mask, a, z, mean, b, c, {}, {}), {}};
  const Tensor dz = empty(dy.sizes(), dy.options(), at::MemoryFormat::ChannelsLast);
  const BnActBwdApply<T> k = {
      shape_of(dz), static_cast<T*>(dz.data_ptr()), data<T>(dy), data<T>(z), nullptr,
      data<uint8_t>(mask), nullptr, data<float>(a), data<float>(mean), data<float>(b), data<float>(c)};
  return {dz, [k](int64_t, int64_t, int64_t begin, int64_t end, T*) { kernels<T>().bn_act_bwd_apply(k, begin, end); }};
}

// dx, finished band by band (see finish_dgrad); the sums are empty without in_mean. Empty as tiled_fprop.
template <class T>
std::optional<Three> tiled_dgrad(
    const OutputGradient<T>& gradient, const Tensor& w, const Tensor& x, const OptTensor& in_scale, const OptTensor& in_shift,
    const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& residual, const OptTensor& residual_mask,
    const Geometry& g) {
  const ConvShape s = conv_shape(x, w, g);
  Tensor dx = empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  const GradientSums<T> k = after_dgrad<T>(dx, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask);
  const int64_t width = (in_mean ? 2 : 1) * s.channels;
  std::vector<std::vector<double>> sums(kTasks);
  const Finish finish = [&](int64_t task, int64_t begin, int64_t end) {
    thread_local std::vector<float> band;
    band.assign(width, 0.0f);
    kernels<T>().gradient_sums(k, begin, end, 1, band.data());
    sums[task].resize(width);
    for (int64_t c = 0; c < width; ++c) sums[task][c] += band[c];
  };
  const bool more = in_scale || residual;
  const bool done = tiled_conv_dgrad<T>(
      s, data<T>(gradient.dz), gradient.fill, pack_filters<T>(s, w, true), k.out, more ? finish : Finish());
  if (!done) return {};
  if (!in_mean) return Three{dx, empty_vector(x, 0), empty_vector(x, 0)};
  Tensor total[2] = {empty_vector(x, s.channels), empty_vector(x, s.channels)};
  for (size_t task = 1; task < sums.size(); ++task) {
    for (size_t c = 0; c < sums[task].size(); ++c) sums[0][c] += sums[task][c];
  }
  for (int64_t i = 0; i < 2; ++i) std::copy_n(&sums[0][i * s.channels], s.channels, total[i].data_ptr<float>());
  return Three{dx, total[0], total[1]};
}

// Undefined where tiled_conv_wgrad's result is.
template <class T>
Tensor tiled_wgrad(
    const Tensor& dz, const Tensor& w, const Tensor& x, const OptTensor& in_scale, const OptTensor& in_shift,
    const Geometry& g) {
  const ConvShape s = conv_shape(x, w, g);
  const Tensor dw =
      tiled_conv_wgrad<T>(s, in_scale ? nullptr : data<T>(x), prologue<T>(s, x, in_scale, in_shift), data<T>(dz));
  if (!dw.defined()) return dw;
  const auto format = w.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  return dw.permute({0, 3, 1, 2}).to(w.scalar_type()).contiguous(format);
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Empty as tiled_fprop.
template <class T>
std::optional<Four> tiled_bprop(
    const Tensor& dy, const Tensor& w, const Tensor& x, const OptTensor& dy_mask, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& in_scale,
    const OptTensor& in_shift, const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& in_act,
    const OptTensor& residual, const OptTensor& residual_mask, const Geometry& g, bool need_dx, bool need_dw) {
  Tensor dx = at::empty({0}, x.options()), dw = at::empty({0}, w.options());
  Tensor sum_dx = empty_vector(x, 0), sum_dx_xhat = empty_vector(x, 0);
  const auto gradient = output_gradient<T>(conv_shape(x, w, g), need_dx, dy, dy_mask, a, z, mean, b, c);
  if (need_dx) {
    const auto found = tiled_dgrad<T>(gradient, w, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask, g);
    if (!found) return {};
    std::tie(dx, sum_dx, sum_dx_xhat) = *found;
  }
  if (need_dw) {
    dw = in_act ? tiled_wgrad<T>(gradient.dz, w, *in_act, {}, {}, g)
                : tiled_wgrad<T>(gradient.dz, w, x, in_scale, in_shift, g);
    if (!dw.defined()) return {};
  }
  return Four{dx, dw, sum_dx, sum_dx_xhat};
}

Four conv_bprop(
    const Tensor& dy, const Tensor& w, const Tensor& x, const OptTensor& dy_mask, const OptTensor& a,
    const OptTensor& z, const OptTensor& mean, const OptTensor& b, const OptTensor& c, const OptTensor& in_scale,
    const OptTensor& in_shift, const OptTensor& in_mean, const OptTensor& in_rstd, const OptTensor& in_act,
    const OptTensor& residual, const OptTensor& residual_mask, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, bool need_dx, bool need_dw) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Geometry g = {stride, padding, dilation, groups};
  check_conv_bprop(
      dy, w, x, dy_mask, a, z, mean, b, c, in_scale, in_shift, in_mean, in_rstd, in_act, residual, residual_mask, g);
  const bool tiled = route(x, w, g, Use::kBackward).tiled;
  const bool single = x.scalar_type() == at::kFloat;
  if (tiled && groups == 1) {
    const auto found = (single ? tiled_bprop<float> : tiled_bprop<bf16>)(
        dy, w, x, dy_mask, a, z, mean, b, c, in_scale, in_shift, in_mean, in_rstd, in_act, residual, residual_mask, g,
        need_dx, need_dw);
    if (found) return *found;
  }
  const Tensor dz = dy_mask || a ? bn_act_bwd_apply(dy, dy_mask, a, z, mean, b, c, {}, {}) : dy;
  Tensor dx = at::empty({0}, x.options()), dw = at::empty({0}, w.options());
  Tensor sum_dx = empty_vector(x, 0), sum_dx_xhat = empty_vector(x, 0);
  const Tensor h = in_act ? *in_act : in_scale && need_dw ? activate(x, *in_scale, *in_shift) : x;
  std::optional<Three> found;  // with groups, tiles compute dx only
  if (need_dx && tiled && groups > 1) {
    const auto by_tiles = [&](auto zero) {
      using T = decltype(zero);
      return tiled_dgrad<T>({dz, {}}, w, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask, g);
    };
    found = single ? by_tiles(float()) : by_tiles(bf16());
  }
  const bool library_dx = need_dx && !found;
  Tensor grad_x, grad_w;
  if (library_dx || need_dw) {
    std::tie(grad_x, grad_w) = conv2d_backward(dz, h, w.to(x.scalar_type()), g, library_dx, need_dw);
  }
  if (need_dw) dw = grad_w.to(w.scalar_type());
  if (found) {
    std::tie(dx, sum_dx, sum_dx_xhat) = *found;
  } else if (need_dx) {
    dx = grad_x.contiguous(format_of(x, &w));
    std::tie(sum_dx, sum_dx_xhat) =
        finish_dgrad(dx, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask);
  }
  return {dx, dw, sum_dx, sum_dx_xhat};
}

Tensor conv_bn_act_over(
    const Tensor& x, const Tensor& w, const BatchNorm& norm, const OptTensor& residual, bool relu,
    const Geometry& geometry, bool over) {
  check_conv_act(x, w, residual, geometry);
  check_batch_norm(x, w.size(0), norm);
  const PackedConv packed = pack(x, w, norm, geometry);
  const auto format = format_of(x, &w);
  const OptTensor beside = residual ? OptTensor(residual->contiguous(format)) : residual;
  return run_packed(x, w, packed, beside, relu, geometry, over).contiguous(format);
}

Tensor conv_bn_act(
    const Tensor& x, const Tensor& w, const OptTensor& bias, const OptTensor& bn_weight, const OptTensor& bn_bias,
    const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& residual, bool relu, double eps,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const BatchNorm norm = {bias, bn_weight, bn_bias, running_mean, running_var, eps};
  return conv_bn_act_over(x, w, norm, residual, relu, {stride, padding, dilation, groups}, false);
}

struct ChainOps {
  // Nothing to fold: the cache of packed filters holds each norm's scale and shift.
  static std::vector<BatchNorm> fold(const Tensor&, std::vector<BatchNorm> norms) { return norms; }
  static Tensor norm_relu(const Tensor& x, const BatchNorm& norm) {
    const auto [scale, shift] = scale_and_shift(x, norm);
    return activate(x, *scale, *shift);
  }
  static constexpr auto conv_bn_act = conv_bn_act_over;
  // In the epilogue of resnet_fast's tiles the norm is free; after oneDNN it takes a pass.
  static bool pool_normalizes(const Tensor& x, const Tensor& w, const Geometry& g) {
    check_conv_act(x, w, {}, g);
    return !route(x, w, g, Use::kInference).tiled;
  }
  static Tensor norm_relu_max_pool(
      const Tensor& x, const BatchNorm& norm, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
    check_batch_norm(x, x.size(1), norm);
    const auto [scale, shift] = scale_and_shift(x, norm);
    return std::get<0>(bn_relu_max_pool(x, scale, shift, kernel, stride, padding, false));
  }
};

std::tuple<std::string, std::string> conv_route(
    const Tensor& x, const Tensor& w, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
    const std::string& op) {
  const Geometry g = {stride, padding, dilation, groups};
  check_conv_act(x, w, {}, g);
  const Use use = op == "conv_fprop" ? Use::kForward : op == "conv_bprop" ? Use::kBackward : Use::kInference;
  const Route found = route(x, w, g, use);
  return {found.by, found.why};
}

Tensor infer_chains(const Tensor& x, const TensorList& tensors, IntArrayRef program, at::ArrayRef<double> eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Trust trust;
  const Tensor y = resnet_fast::infer_chains<ChainOps>(x, tensors, program, eps);
  return trust.was_right() ? y : resnet_fast::infer_chains<ChainOps>(x, tensors, program, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("conv_fprop", &conv_fprop);
  m.impl("conv_bprop", &conv_bprop);
  m.impl("conv_bn_act", &conv_bn_act);
  m.impl("conv_route", &conv_route);
  m.impl("infer_chains", &infer_chains);
}

}  // namespace resnet_fast::cpu
