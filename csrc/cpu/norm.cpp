// The memory-bound ops on CPU tensors: checks, allocation, dtype dispatch, threads. The arithmetic is in
// norm.inl. Work is partitioned by shape, not by thread count, so results do not depend on the thread count.
#include "norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "cpu_features.h"
#include "memory.h"

namespace resnet_fast {

template <class T>
const Kernels<T>& kernels() {
#if RESNET_FAST_X86_64
  static const Kernels<T>& best = active_isa() >= Isa::AVX512 ? avx512::kernels<T>()
                                  : active_isa() >= Isa::AVX2 ? avx2::kernels<T>()
                                                              : baseline::kernels<T>();
#else
  static const Kernels<T>& best = baseline::kernels<T>();
#endif
  return best;
}

namespace cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // minimum elements per task

template <class F>
void for_rows(const Shape& s, F run) {
  if (s.rows * s.inner == 0) return;
  at::parallel_for(0, s.rows, std::max<int64_t>(1, kGrain / s.inner), run);
}

// A tensor whose coefficients and sums are matrices [images, channels]. In NCHW a row has its own coefficients, so each
// row is a channel of a single image; in NHWC each image is a range of rows. `images` is 1 where they are vectors.
struct Images {
  Shape shape;
  int64_t images;

  explicit Images(const Shape& s) : shape(s), images(1) {}
  explicit Images(const Tensor& x) : shape(shape_of(x)), images(shape.nhwc ? x.size(0) : 1) {
    if (!shape.nhwc) shape.channels = shape.rows;
  }

  int64_t rows() const { return shape.rows / images; }  // per image

  // run(offset, begin, end) for rows of one image, whose coefficients are at `offset`.
  template <class F>
  void for_rows(F run) const {
    cpu::for_rows(shape, [&](int64_t begin, int64_t end) {
      for (int64_t next; begin < end; begin = next) {
        const int64_t image = begin / rows();
        next = std::min(end, (image + 1) * rows());
        run(image * shape.channels, begin, next);
      }
    });
  }
};

// NHWC reductions: one partial result per block of rows of an image, merged in order.
int64_t rows_a_block(const Images& s) { return std::clamp<int64_t>((s.rows() + 7) / 8, 64, 512); }

// Sums over all rows of an image: run(image, begin, end, step, partial) adds k sums per channel; returns k vectors of
// images · channels values.
template <class A, class F>
std::vector<Tensor> reduce_rows(const Images& all, int k, at::TensorOptions options, F run) {
  const Shape& s = all.shape;
  std::vector<Tensor> out;
  std::vector<A*> to;
  for (int j = 0; j < k; ++j) {
    out.push_back(at::zeros({all.images * s.channels}, options));
    to.push_back(static_cast<A*>(out.back().data_ptr()));
  }
  if (s.rows * s.inner == 0) return out;
  if (!s.nhwc) {
    at::parallel_for(0, s.channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        A sums[3] = {0, 0, 0};
        run(0, c, s.rows, s.channels, sums);
        for (int j = 0; j < k; ++j) to[j][c] = sums[j];
      }
    });
    return out;
  }
  const int64_t rows = all.rows(), size = rows_a_block(all), blocks = (rows + size - 1) / size, width = k * s.inner;
  const Tensor partial = at::zeros({all.images * blocks, width}, options);
  A* p = static_cast<A*>(partial.data_ptr());
  at::parallel_for(0, all.images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / blocks, first = image * rows + i % blocks * size;
      run(image, first, std::min((image + 1) * rows, first + size), 1, p + i * width);
    }
  });
  at::parallel_for(0, all.images, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums;
    for (int64_t image = begin; image < end; ++image) {
      sums.assign(width, 0.0);
      for (int64_t i = image * blocks; i < (image + 1) * blocks; ++i) {
        for (int64_t c = 0; c < width; ++c) sums[c] += p[i * width + c];
      }
      for (int64_t c = 0; c < width; ++c) to[c / s.inner][image * s.inner + c % s.inner] = A(sums[c]);
    }
  });
  return out;
}

// The sums of `gradient_sums` as reduce_rows returns them; mean[0] is a matrix where `all` has several images.
template <class T, class A = accumulate_t<T>>
std::vector<Tensor> gradient_sums(const Images& all, const GradientSums<T>& k, int count, at::TensorOptions options) {
  return reduce_rows<A>(all, count, options, [&](int64_t image, int64_t begin, int64_t end, int64_t step, A* to) {
    GradientSums<T> own = k;
    if (image > 0) own.mean[0] += image * all.shape.channels;
    kernels<T>().gradient_sums(own, begin, end, step, to);
  });
}

// Writes to y, which may be z.
void bn_act_into(
    const Tensor& y, const Tensor& mask, const Tensor& z, const OptTensor& scale, const OptTensor& shift,
    const OptTensor& residual, const OptTensor& res_scale, const OptTensor& res_shift, bool relu) {
  dispatch(z, "bn_act", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const BnAct<T> k = {
        shape_of(z), static_cast<T*>(y.data_ptr()), mask.numel() ? mask.data_ptr<uint8_t>() : nullptr,
        data<T>(z), data<T>(residual), data<A>(scale), data<A>(shift), data<A>(res_scale), data<A>(res_shift),
        relu};
    for_rows(k.shape, [&](int64_t begin, int64_t end) { kernels<T>().bn_act(k, begin, end); });
  });
}

std::tuple<Tensor, Tensor> bn_act_unchecked(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
    const OptTensor& res_scale, const OptTensor& res_shift, bool relu, bool save_mask) {
  const Tensor y = empty(z.sizes(), z.options(), format_of(z));
  const Tensor mask = empty_mask(z, relu && save_mask);
  bn_act_into(y, mask, z, scale, shift, residual, res_scale, res_shift, relu);
  return {y, mask};
}

}  // namespace

void bn_act_over(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, const OptTensor& residual, bool relu) {
  bn_act_into(z, at::empty({0}, at::kByte), z, scale, shift, residual, {}, {}, relu);
}

namespace {

// mean and m2, each images · channels values.
std::tuple<Tensor, Tensor> statistics(const Tensor& x, const Images& all) {
  const auto options = x.options().dtype(accumulate_type(x));
  const Shape& s = all.shape;
  Tensor mean = at::zeros({all.images * s.channels}, options), m2 = at::zeros_like(mean);
  if (x.numel() == 0) return {mean, m2};
  dispatch(x, "statistics", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    using W = wider_t<A>;
    const Statistics<T> k = {s, data<T>(x)};
    A *to_mean = static_cast<A*>(mean.data_ptr()), *to_m2 = static_cast<A*>(m2.data_ptr());
    if (!s.nhwc) {
      at::parallel_for(0, s.channels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          W moments[2];
          kernels<T>().statistics(k, c, s.rows, s.channels, moments);
          to_mean[c] = A(moments[0]);
          to_m2[c] = A(moments[1]);
        }
      });
      return;
    }
    const int64_t rows = all.rows(), blocks = (rows + kStatisticsRows - 1) / kStatisticsRows, width = 2 * s.inner;
    const auto block = [&](int64_t i) { return std::min(kStatisticsRows, rows - i % blocks * kStatisticsRows); };
    std::vector<W> partial(all.images * blocks * width);
    at::parallel_for(0, all.images * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / blocks * rows + i % blocks * kStatisticsRows;
        kernels<T>().statistics(k, first, first + block(i), 1, &partial[i * width]);
      }
    });
    at::parallel_for(0, all.images * s.inner, 16, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t image = at / s.inner, c = at % s.inner;
        Moments<W> sum = {0, 0, 0};
        for (int64_t i = image * blocks; i < (image + 1) * blocks; ++i) {
          sum = merge(sum, {W(block(i)), partial[i * width + c], partial[i * width + s.inner + c]});
        }
        to_mean[at] = A(sum.mean);
        to_m2[at] = A(sum.m2);
      }
    });
  });
  return {mean, m2};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  check_bn_stats(x);
  return statistics(x, Images(shape_of(x)));
}

std::tuple<Tensor, Tensor> image_stats(const Tensor& x) {
  check_image_stats(x);
  const auto [mean, m2] = statistics(x, Images(x));
  return {mean.view(x.sizes().slice(0, 2)), m2.view(x.sizes().slice(0, 2))};
}

std::tuple<Tensor, Tensor, Tensor> bn_finalize(
    const Tensor& mean, const Tensor& m2, int64_t count, const OptTensor& weight, const OptTensor& bias, double eps) {
  check_bn_finalize(mean, m2, weight, bias);
  const int64_t channels = mean.numel();
  const auto wide = [&](const OptTensor& t, double fill) {
    return t ? t->to(mean.scalar_type()).contiguous() : at::full({channels}, fill, mean.options());
  };
  const Tensor w = wide(weight, 1.0), b = wide(bias, 0.0);
  Tensor scale = at::empty_like(mean), shift = at::empty_like(mean), rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "bn_finalize", [&] {
    using A = scalar_t;
    using W = wider_t<A>;
    const W n = W(std::max<int64_t>(count, 1));
    const A *from_mean = data<A>(mean), *from_m2 = data<A>(m2), *from_w = data<A>(w), *from_b = data<A>(b);
    A *to_scale = scale.data_ptr<A>(), *to_shift = shift.data_ptr<A>(), *to_rstd = rstd.data_ptr<A>();
    for (int64_t c = 0; c < channels; ++c) {
      const auto r = finalize<A, W>(
          from_mean[c], W(from_m2[c]) / n, from_w[c], from_b[c], W(eps), [](W v) { return 1 / std::sqrt(v); });
      to_scale[c] = r.scale, to_shift[c] = r.shift, to_rstd[c] = r.rstd;
    }
  });
  return {scale, shift, rstd};
}

std::pair<OptTensor, OptTensor> scale_and_shift(const Tensor& x, const BatchNorm& norm) {
  const auto wide = [&](const OptTensor& t) { return t->to(accumulate_type(x)).contiguous(); };
  if (norm.running_mean) {
    Tensor mean = wide(norm.running_mean);
    if (norm.conv_bias) mean = mean - wide(norm.conv_bias);
    const auto [scale, shift, rstd] = bn_finalize(mean, wide(norm.running_var), 1, norm.weight, norm.bias, norm.eps);
    return {scale, shift};
  }
  if (norm.channels() == 0) return {};
  const auto options = x.options().dtype(accumulate_type(x));
  const auto all = [&](double value) { return at::full({norm.channels()}, value, options); };
  const Tensor scale = norm.weight ? wide(norm.weight).clone() : all(1);
  Tensor shift = norm.bias ? wide(norm.bias).clone() : all(0);
  if (norm.conv_bias) shift.addcmul_(wide(norm.conv_bias), scale);
  return {scale, shift};
}

std::vector<Tensor> bn_fold(const Tensor& x, const c10::List<OptTensor>& vectors, at::ArrayRef<double> eps) {
  std::vector<Tensor> results;
  for (const BatchNorm& norm : check_bn_fold(x, vectors, eps)) {
    const auto [scale, shift] = scale_and_shift(x, norm);
    results.insert(results.end(), {*scale, *shift});
  }
  return results;
}

std::tuple<Tensor, Tensor> bn_bwd_finalize(
    const Tensor& sum_dy, const Tensor& sum_dy_xhat, const Tensor& scale, const Tensor& rstd, int64_t count) {
  check_bn_bwd_finalize(sum_dy, sum_dy_xhat, scale, rstd);
  const int64_t channels = sum_dy.numel();
  Tensor b = at::empty_like(sum_dy), c = at::empty_like(sum_dy);
  AT_DISPATCH_FLOATING_TYPES(sum_dy.scalar_type(), "bn_bwd_finalize", [&] {
    using A = scalar_t;
    const A n = A(std::max<int64_t>(count, 1));
    const A *dy = data<A>(sum_dy), *dy_xhat = data<A>(sum_dy_xhat), *from_scale = data<A>(scale);
    const A* from_rstd = data<A>(rstd);
    A *to_b = b.data_ptr<A>(), *to_c = c.data_ptr<A>();
    for (int64_t i = 0; i < channels; ++i) {
      const auto r = finalize_gradient<A>(dy[i], dy_xhat[i], from_scale[i], from_rstd[i], n);
      to_b[i] = r.b, to_c[i] = r.c;
    }
  });
  return {b, c};
}

std::tuple<Tensor, Tensor> bn_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual, const OptTensor& res_scale,
    const OptTensor& res_shift, bool relu, bool save_mask) {
  check_bn_act(z, scale, shift, residual, res_scale, res_shift);
  return bn_act_unchecked(z, scale, shift, residual, res_scale, res_shift, relu, save_mask);
}

std::tuple<Tensor, Tensor> add_relu(const Tensor& x, const Tensor& residual, bool save_mask) {
  check_add_relu(x, residual);
  return bn_act_unchecked(x, {}, {}, residual, {}, {}, true, save_mask);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_bwd_reduce(
    const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean, const Tensor& rstd,
    const OptTensor& residual, const OptTensor& res_mean, const OptTensor& res_rstd) {
  check_bn_act_bwd_reduce(dy, mask, z, mean, rstd, residual, res_mean, res_rstd);
  return dispatch(dy, "bn_act_bwd_reduce", [&](auto t) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(t);
    using A = accumulate_t<T>;
    GradientSums<T> k = {};
    k.shape = shape_of(dy);
    k.dy = data<T>(dy);
    k.mask = data<uint8_t>(mask);
    k.z[0] = data<T>(z), k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(rstd);
    k.z[1] = data<T>(residual), k.mean[1] = data<A>(res_mean), k.rstd[1] = data<A>(res_rstd);
    const auto options = dy.options().dtype(accumulate_type(dy));
    auto sums = gradient_sums<T>(Images(k.shape), k, residual ? 3 : 2, options);
    return {sums[0], sums[1], residual ? sums[2] : at::empty({0}, options)};
  });
}

Tensor bn_act_bwd_apply(
    const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b, const OptTensor& c, const OptTensor& residual, const OptTensor& residual_mask) {
  const Tensor dz = empty(dy.sizes(), dy.options(), format_of(dy));
  dispatch(dy, "bn_act_bwd_apply", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const BnActBwdApply<T> k = {
        shape_of(dy), static_cast<T*>(dz.data_ptr()), data<T>(dy), data<T>(z), data<T>(residual),
        data<uint8_t>(mask), data<uint8_t>(residual_mask), data<A>(a), data<A>(mean), data<A>(b), data<A>(c)};
    for_rows(k.shape, [&](int64_t begin, int64_t end) { kernels<T>().bn_act_bwd_apply(k, begin, end); });
  });
  return dz;
}

std::tuple<Tensor, Tensor> gated_act(
    const Tensor& z, const Tensor& scale, const Tensor& shift, const OptTensor& residual, bool relu, bool save_mask) {
  check_gated_act(z, scale, shift, residual);
  const Tensor y = empty(z.sizes(), z.options(), format_of(z));
  const Tensor mask = empty_mask(z, relu && save_mask);
  const Images all(z);
  dispatch(z, "gated_act", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    BnAct<T> k = {};
    k.shape = all.shape, k.relu = relu;
    k.y = static_cast<T*>(y.data_ptr()), k.mask = mask.numel() ? mask.data_ptr<uint8_t>() : nullptr;
    k.z = data<T>(z), k.residual = data<T>(residual);
    all.for_rows([&](int64_t offset, int64_t begin, int64_t end) {
      BnAct<T> own = k;
      own.scale = data<A>(scale) + offset, own.shift = data<A>(shift) + offset;
      kernels<T>().bn_act(own, begin, end);
    });
  });
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> gated_act_bwd_reduce(
    const Tensor& dy, const OptTensor& mask, const Tensor& z, const Tensor& mean) {
  check_gated_act_bwd_reduce(dy, mask, z, mean);
  const Tensor masked = mask ? empty(dy.sizes(), dy.options(), format_of(dy)) : at::empty({0}, dy.options());
  const Images all(dy);
  return dispatch(dy, "gated_act_bwd_reduce", [&](auto t) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const Tensor one = at::ones({all.shape.channels}, mean.options());
    GradientSums<T> k = {};
    k.shape = all.shape, k.dy = data<T>(dy), k.mask = data<uint8_t>(mask);
    k.out = mask ? static_cast<T*>(masked.data_ptr()) : nullptr;
    k.z[0] = data<T>(z), k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(one);
    const auto sums = gradient_sums<T>(all, k, 2, mean.options());
    return {masked, sums[0].view(mean.sizes()), sums[1].view(mean.sizes())};
  });
}

Tensor gated_act_bwd_apply(
    const Tensor& dy, const Tensor& scale, const Tensor& shift, const OptTensor& z, const OptTensor& mean,
    const OptTensor& b) {
  check_gated_act_bwd_apply(dy, scale, shift, z, mean, b);
  const Tensor dz = empty(dy.sizes(), dy.options(), format_of(dy));
  const Images all(dy);
  dispatch(dy, "gated_act_bwd_apply", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    BnActBwdApply<T> k = {};
    k.shape = all.shape, k.dz = static_cast<T*>(dz.data_ptr()), k.dy = data<T>(dy), k.z = data<T>(z);
    all.for_rows([&](int64_t offset, int64_t begin, int64_t end) {
      BnActBwdApply<T> own = k;
      own.a = data<A>(scale) + offset, own.c = data<A>(shift) + offset;
      if (b) own.mean = data<A>(mean) + offset, own.b = data<A>(b) + offset;
      kernels<T>().bn_act_bwd_apply(own, begin, end);
    });
  });
  return dz;
}

Tensor add_relu_bwd(const Tensor& dy, const Tensor& mask) {
  check_add_relu_bwd(dy, mask);
  return bn_act_bwd_apply(dy, mask, {}, {}, {}, {}, {}, {}, {});
}

std::tuple<Tensor, Tensor> finish_dgrad(
    Tensor& dx, const Tensor& x, const OptTensor& scale, const OptTensor& shift, const OptTensor& mean,
    const OptTensor& rstd, const OptTensor& residual, const OptTensor& residual_mask) {
  const auto options = dx.options().dtype(accumulate_type(dx));
  if (!scale && !mean && !residual) return {at::empty({0}, options), at::empty({0}, options)};
  return dispatch(dx, "conv_bprop", [&](auto t) -> std::tuple<Tensor, Tensor> {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const GradientSums<T> k = after_dgrad<T>(dx, x, scale, shift, mean, rstd, residual, residual_mask);
    auto sums = gradient_sums<T>(Images(k.shape), k, mean ? 2 : 1, options);
    if (!mean) return {at::empty({0}, options), at::empty({0}, options)};
    return {sums[0], sums[1]};
  });
}

std::tuple<Tensor, Tensor> bn_relu_max_pool(
    const Tensor& z, const OptTensor& scale, const OptTensor& shift, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef padding, bool save_index) {
  const Windows w = check_bn_relu_max_pool(z, scale, shift, kernel, stride, padding);
  const Tensor y = empty(w.sizes(), z.options(), format_of(z));
  const auto bytes = z.options().dtype(at::kByte);
  const Tensor index = save_index ? empty(w.sizes(), bytes, format_of(z)) : at::empty({0}, bytes);
  dispatch(z, "bn_relu_max_pool", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const BnReluMaxPool<T> k = {
        w, static_cast<T*>(y.data_ptr()), index.numel() ? index.data_ptr<uint8_t>() : nullptr,
        data<T>(z), data<A>(scale), data<A>(shift)};
    for_rows(w.output(), [&](int64_t begin, int64_t end) { kernels<T>().bn_relu_max_pool(k, begin, end); });
  });
  return {y, index};
}

std::tuple<Tensor, Tensor, Tensor> max_pool_bwd(
    const Tensor& dy, const Tensor& index, const Tensor& x, const OptTensor& mean, const OptTensor& rstd,
    at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const Windows w = check_max_pool_bwd(dy, index, x, mean, rstd, kernel, stride, padding);
  const Tensor dx = empty(x.sizes(), x.options(), format_of(x));
  return dispatch(x, "max_pool_bwd", [&](auto t) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(t);
    using A = accumulate_t<T>;
    GradientSums<T> k = {};
    k.shape = w.input(), k.windows = w, k.index = data<uint8_t>(index);
    k.out = static_cast<T*>(dx.data_ptr()), k.dy = data<T>(dy);
    if (mean) k.z[0] = data<T>(x), k.mean[0] = data<A>(mean), k.rstd[0] = data<A>(rstd);
    const auto options = x.options().dtype(accumulate_type(x));
    auto sums = gradient_sums<T>(Images(k.shape), k, mean ? 2 : 1, options);
    if (!mean) return {dx, at::empty({0}, options), at::empty({0}, options)};
    return {dx, sums[0], sums[1]};
  });
}

// As PyTorch's in-place ops: an error if t requires a gradient, and a new version for autograd.
void will_write(const Tensor& t) {
  TORCH_CHECK(!(t.requires_grad() && at::GradMode::is_enabled()),
              "update_running: `running`: a leaf Variable that requires grad is being used in an in-place operation");
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// running = (1 - momentum)·running + momentum·batch in place, with the unbiased variance m2 / (count - 1), and one batch
// more in `tracked`. `moments` holds mean and m2 of each norm, `running` its mean and variance. One thread: the vectors
// are short. Rounded as PyTorch's vectorized ops round (mul_, then add_ with alpha).
void update_running(
    at::TensorList moments, at::IntArrayRef counts, at::TensorList running, at::TensorList tracked, double momentum) {
  TORCH_CHECK_VALUE(moments.size() == 2 * counts.size() && running.size() == moments.size(),
                    "update_running: expected two of `moments` and of `running` for each of ", counts.size(),
                    " `counts`, got ", moments.size(), " and ", running.size());
  for (size_t i = 0; i < running.size(); ++i) {
    const Tensor& to = running[i];
    const Tensor& batch = moments[i];
    check_dtype({"update_running", "running", to}, {at::kFloat, at::kDouble});
    check_dtype({"update_running", "moments", batch}, {to.scalar_type()});
    check_same_shape({"update_running", "running", to}, {"update_running", "moments", batch});
    TORCH_CHECK_VALUE(to.is_contiguous() && batch.is_contiguous(), "update_running: expected contiguous tensors");
  }
  for (const Tensor& t : tracked) {
    check_dtype({"update_running", "tracked", t}, {at::kLong});
    TORCH_CHECK_VALUE(t.numel() == 1, "update_running: `tracked`: expected one value each, got ", t.numel());
  }
  for (size_t i = 0; i < running.size(); ++i) {
    will_write(running[i]);
    const auto write = [&](auto zero) {
      using A = decltype(zero);
      const A divisor = i % 2 ? A(counts[i / 2] - 1) : A(1), keep = A(1 - momentum), take = A(momentum);
      A* const to = running[i].data_ptr<A>();
      const A* const batch = moments[i].const_data_ptr<A>();
      for (int64_t c = 0; c < running[i].numel(); ++c) to[c] = std::fma(take, batch[c] / divisor, keep * to[c]);
    };
    running[i].scalar_type() == at::kDouble ? write(double()) : write(float());
  }
  for (const Tensor& t : tracked) {
    will_write(t);
    ++*t.data_ptr<int64_t>();
  }
}

// The sum over an image's rows is that of gradient_sums with x as the gradient, 64 rows at a time: long sums would lose
// precision. For NCHW, PyTorch's kernel is one pass.
Tensor global_avg_pool(const Tensor& x) {
  check_4d({"global_avg_pool", "x", x});
  const Shape s = shape_of(x);
  if (!s.nhwc) return at::adaptive_avg_pool2d(x, {1, 1}).flatten(1).contiguous();
  return dispatch(x, "global_avg_pool", [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const int64_t images = x.size(0), pixels = s.rows / images, channels = s.channels;
    const Tensor y = at::empty({images, channels}, x.options());
    T* to = static_cast<T*>(y.data_ptr());
    GradientSums<T> k = {};
    k.shape = s, k.dy = data<T>(x);
    at::parallel_for(0, images, std::max<int64_t>(1, kGrain / (pixels * channels)), [&](int64_t begin, int64_t end) {
      std::vector<A> part;
      std::vector<double> sums;
      for (int64_t i = begin; i < end; ++i) {
        sums.assign(channels, 0.0);
        for (int64_t row = i * pixels, next; row < (i + 1) * pixels; row = next) {
          next = std::min(row + 64, (i + 1) * pixels);
          part.assign(channels, A(0));
          kernels<T>().gradient_sums(k, row, next, 1, part.data());
          for (int64_t c = 0; c < channels; ++c) sums[c] += part[c];
        }
        for (int64_t c = 0; c < channels; ++c) to[i * channels + c] = narrow<T>(A(sums[c] / double(pixels)));
      }
    });
    return y;
  });
}

TORCH_LIBRARY_FRAGMENT(resnet_fast_native, m) {  // only CPU tensors; in autograd/running_stats.py and dispatch/ops.py
  m.def("image_stats(Tensor x) -> (Tensor mean, Tensor m2)");
  m.def(
      "gated_act(Tensor z, Tensor scale, Tensor shift, Tensor? residual, bool relu, bool save_mask) "
      "-> (Tensor y, Tensor mask)");
  m.def(
      "gated_act_bwd_reduce(Tensor dy, Tensor? mask, Tensor z, Tensor mean) "
      "-> (Tensor dy_masked, Tensor sum_dy, Tensor sum_dy_z)");
  m.def(
      "gated_act_bwd_apply(Tensor dy, Tensor scale, Tensor shift, Tensor? z, Tensor? mean, Tensor? b) -> Tensor");
  m.def(
      "update_running(Tensor[] moments, int[] counts, Tensor(a!)[] running, Tensor(b!)[] tracked, float momentum) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("bn_relu_max_pool", &bn_relu_max_pool);
  m.impl("max_pool_bwd", &max_pool_bwd);
  m.impl("global_avg_pool", &global_avg_pool);
  m.impl("bn_stats", &bn_stats);
  m.impl("image_stats", &image_stats);
  m.impl("gated_act", &gated_act);
  m.impl("gated_act_bwd_reduce", &gated_act_bwd_reduce);
  m.impl("gated_act_bwd_apply", &gated_act_bwd_apply);
  m.impl("bn_finalize", &bn_finalize);
  m.impl("bn_fold", &bn_fold);
  m.impl("update_running", &update_running);
  m.impl("bn_bwd_finalize", &bn_bwd_finalize);
  m.impl("bn_act", &bn_act);
  m.impl("add_relu", &add_relu);
  m.impl("add_relu_bwd", &add_relu_bwd);
  m.impl("bn_act_bwd_reduce", &bn_act_bwd_reduce);
  m.impl("bn_act_bwd_apply", [](const Tensor& dy, const OptTensor& mask, const OptTensor& a, const OptTensor& z,
                                const OptTensor& mean, const OptTensor& b, const OptTensor& c,
                                const OptTensor& residual) {
    check_bn_act_bwd_apply(dy, mask, a, z, mean, b, c, residual);
    return bn_act_bwd_apply(dy, mask, a, z, mean, b, c, residual, {});
  });
}

}  // namespace cpu
}  // namespace resnet_fast
