// Inference of several chains (resnet_fast/spec/chain.py) in one call: no Python and no dispatcher between the
// convolutions, all norms folded at once, and an addition may overwrite a tensor that has no other reader.
#pragma once

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "tensors.h"

namespace resnet_fast {

using TensorList = c10::List<OptTensor>;

// What a chain adds to its last convolution; values are indices into SHORTCUTS of dispatch/native_inference.py.
enum class Shortcut : int64_t { kNone, kIdentity, kProjection, kZeroPad };

// Reads the program word by word, with bounds checks: the lists come from Python and may be wrong.
class Words {
 public:
  explicit Words(at::IntArrayRef words) : words_(words) {}
  bool done() const { return at_ == words_.size(); }
  int64_t next() { return take(1)[0]; }
  at::IntArrayRef take(size_t count) {
    TORCH_CHECK_VALUE(count <= words_.size() - at_, "infer_chains: `program` ends in the middle of a chain");
    at_ += count;
    return words_.slice(at_ - count, count);
  }

 private:
  at::IntArrayRef words_;
  size_t at_ = 0;
};

// A chain of n convolutions. `filters` and `norms` are its first indices in the lists of all chains. A projection's
// filter and norm follow those of the convolutions; the first norm is the one before the first convolution.
struct Chain {
  int64_t n;
  Shortcut shortcut;
  bool relu;
  int64_t pad_stride;
  at::IntArrayRef geometry, windows;  // 7 words per convolution; 6 for a pool, else none
  size_t filters, norms;
  bool normalizes;  // before its first convolution
};

struct Chains {
  std::vector<Chain> all;
  std::vector<Tensor> filters;
  std::vector<BatchNorm> norms;
};

// For each chain, `program` holds
//   n, shortcut, relu, pools, and the stride of a zero-padding shortcut (else 0),
//   stride[2] padding[2] dilation[2] groups of its n convolutions and of a projection,
//   kernel[2] stride[2] padding[2] of a pool;
// `tensors` holds weight and bias of those convolutions, then weight, bias, running mean and running variance of the
// norms: before the first convolution, after each, and after the projection. `eps` holds one number per norm.
inline Chains read_chains(const TensorList& tensors, at::IntArrayRef program, at::ArrayRef<double> eps) {
  Chains chains;
  Words words(program);
  size_t at = 0;
  const auto next = [&] { return OptTensor(tensors.get(at++)); };
  while (!words.done()) {
    const int64_t n = words.next();
    const auto shortcut = Shortcut(words.next());
    const bool relu = words.next() != 0, pools = words.next() != 0;
    const int64_t pad_stride = words.next();
    TORCH_CHECK_VALUE(n >= 1 && n <= int64_t(program.size()),
                      "infer_chains: `program`: expected 1 or more convolutions in every chain, got ", n);
    const int64_t convs = n + (shortcut == Shortcut::kProjection);
    const at::IntArrayRef geometry = words.take(7 * convs), windows = words.take(pools ? 6 : 0);
    const size_t filters = chains.filters.size(), norms = chains.norms.size();
    TORCH_CHECK_VALUE(at + 2 * convs + 4 * (n + 2) <= tensors.size() && norms + n + 2 <= eps.size(),
                      "infer_chains: `tensors` or `eps` is too short for a chain of ", n, " convolutions");
    chains.all.push_back({n, shortcut, relu, pad_stride, geometry, windows, filters, norms, false});
    chains.norms.resize(norms + n + 2);
    for (int64_t i = 0; i < convs; ++i) {
      OptTensor weight = next();
      TORCH_CHECK_VALUE(weight && weight->dim() == 4, "infer_chains: `tensors`: expected filters of 4 dimensions");
      chains.filters.push_back(*std::move(weight));
      chains.norms[norms + i + 1].conv_bias = next();
    }
    for (size_t i = norms; i < chains.norms.size(); ++i) {
      BatchNorm& norm = chains.norms[i];
      for (OptTensor* t : {&norm.weight, &norm.bias, &norm.running_mean, &norm.running_var}) *t = next();
      norm.eps = eps[i];
      TORCH_CHECK_VALUE(norm.running_mean.has_value() == norm.running_var.has_value(),
                        "infer_chains: `tensors`: expected both running mean and running variance, or neither");
    }
    chains.all.back().normalizes = chains.norms[norms].running_mean.has_value();
  }
  TORCH_CHECK_VALUE(at == tensors.size() && chains.norms.size() == eps.size(),
                    "infer_chains: `tensors` and `eps`: expected ", at, " and ", chains.norms.size(), " entries, got ",
                    tensors.size(), " and ", eps.size());
  return chains;
}

// Every stride-th pixel of x, with zeros in the added channels (option A of He et al. 2015).
inline Tensor zero_pad(const Tensor& x, int64_t channels, int64_t stride) {
  TORCH_CHECK_VALUE(stride >= 1, "infer_chains: `program`: expected a zero-padding stride of at least 1, got ", stride);
  const Tensor pixels = x.slice(2, 0, c10::nullopt, stride).slice(3, 0, c10::nullopt, stride);
  return at::constant_pad_nd(pixels, {0, 0, 0, 0, 0, channels - x.size(1)});
}

// y of the chains on x [N,C,H,W].
//
// Ops holds the ops of a device: fold converts the norms to the form that the other ops take; norm_relu;
// conv_bn_act, whose last argument lets it overwrite the residual and return it; norm_relu_max_pool; and
// pool_normalizes, which says whether the pool after a convolution applies its norm at less cost.
template <class Ops>
Tensor infer_chains(const Tensor& x, const TensorList& tensors, at::IntArrayRef program, at::ArrayRef<double> eps) {
  TORCH_CHECK_VALUE(x.dim() == 4, "infer_chains: `x`: expected 4 dimensions, got ", x.dim());
  Chains chains = read_chains(tensors, program, eps);
  const auto norms = Ops::fold(x, std::move(chains.norms));
  const typename decltype(norms)::value_type none = {};

  Tensor in = x;
  for (const Chain& chain : chains.all) {
    const int64_t n = chain.n;
    const Tensor* const filters = &chains.filters[chain.filters];
    const at::MemoryFormat format = format_of(in, filters);  // of all results of the chain
    const auto geometry = [&](int64_t i) {
      const at::IntArrayRef g = chain.geometry.slice(7 * i, 7);
      return Geometry{g.slice(0, 2), g.slice(2, 2), g.slice(4, 2), g[6]};
    };
    const auto convolve = [&](int64_t i, const Tensor& h, const auto& norm, const OptTensor& residual, bool relu,
                              bool over) {
      return Ops::conv_bn_act(h, filters[i], norm, residual, relu, geometry(i), over).contiguous(format);
    };
    const auto norm = [&](int64_t i) -> const auto& { return norms[chain.norms + i + 1]; };
    const at::IntArrayRef w = chain.windows;

    Tensor h = in;
    if (chain.normalizes) h = Ops::norm_relu(in, norms[chain.norms]);
    OptTensor skip;
    if (chain.shortcut == Shortcut::kIdentity) skip = in;
    if (chain.shortcut == Shortcut::kProjection) skip = convolve(n, h, norm(n), {}, false, false);
    if (chain.shortcut == Shortcut::kZeroPad) skip = zero_pad(in, filters[n - 1].size(0), chain.pad_stride);
    // `skip` may be overwritten unless it is x itself, the caller's tensor. It has no reader after the last
    // convolution starts, unless it is that convolution's own input (checked below).
    const bool ours = chain.shortcut != Shortcut::kIdentity || !in.is_same(x);
    in = Tensor();
    for (int64_t i = 0; i < n; ++i) {
      const bool last = i == n - 1;
      const bool pool = last && !w.empty();  // the pool applies the ReLU
      const bool relu = last ? chain.relu && !pool : true;
      const bool over = last && skip && ours && !h.is_alias_of(*skip);
      const bool left = pool && !skip && Ops::pool_normalizes(h, filters[i], geometry(i));
      h = convolve(i, h, left ? none : norm(i), last ? skip : OptTensor(), relu, over);
      if (pool) h = Ops::norm_relu_max_pool(h, left ? norm(i) : none, w.slice(0, 2), w.slice(2, 2), w.slice(4, 2));
    }
    in = h;
  }
  return in;
}

}  // namespace resnet_fast
