// Inference of chains of resnet_fast/spec/chain.py, one after another, in one call: no Python and no dispatcher between
// their convolutions, all norms folded at once, and an addition may write over a tensor that nobody else will read.
#pragma once

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "tensors.h"

namespace resnet_fast {

using TensorList = c10::List<OptTensor>;

// What a chain adds to its last convolution; the numbers are SHORTCUTS of dispatch/native_inference.py.
enum class Shortcut : int64_t { kNone, kIdentity, kProjection, kZeroPad };

// The program's words, one by one; its lists come from Python, which may have got them wrong.
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

// A chain of n convolutions, and its places among the filters and norms of all: a projection's are behind those of
// the convolutions, and the first norm is the one before them.
struct Chain {
  int64_t n;
  Shortcut shortcut;
  bool relu;
  int64_t pad_stride;
  at::IntArrayRef geometry, windows;  // 7 words a convolution, 6 of a pool or none
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
// `tensors` weight and bias of those convolutions, then weight, bias, running mean and running variance of the norm
// before the first convolution, of those after each, and of the projection's; `eps` one number a norm.
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
                      "infer_chains: `tensors` and `eps`: expected more for a chain of ", n, " convolutions");
    chains.all.push_back({n, shortcut, relu, pad_stride, geometry, windows, filters, norms, false});
    chains.norms.resize(norms + n + 2);
    for (int64_t i = 0; i < convs; ++i) {
      OptTensor weight = next();
      TORCH_CHECK_VALUE(weight && weight->dim() == 4, "infer_chains: `tensors`: expected filters, 4 dimensions");
      chains.filters.push_back(*std::move(weight));
      chains.norms[norms + i + 1].conv_bias = next();
    }
    for (size_t i = norms; i < chains.norms.size(); ++i) {
      BatchNorm& norm = chains.norms[i];
      for (OptTensor* t : {&norm.weight, &norm.bias, &norm.running_mean, &norm.running_var}) *t = next();
      norm.eps = eps[i];
      TORCH_CHECK_VALUE(norm.running_mean.has_value() == norm.running_var.has_value(),
                        "infer_chains: `tensors`: expected a running mean and a running variance, or neither");
    }
    chains.all.back().normalizes = chains.norms[norms].running_mean.has_value();
  }
  TORCH_CHECK_VALUE(at == tensors.size() && chains.norms.size() == eps.size(),
                    "infer_chains: `tensors` and `eps`: expected ", at, " and ", chains.norms.size(), ", got ",
                    tensors.size(), " and ", eps.size());
  return chains;
}

// Every stride-th pixel of x and zeros in the channels that it does not have (option A of He et al. 2015).
inline Tensor zero_pad(const Tensor& x, int64_t channels, int64_t stride) {
  TORCH_CHECK_VALUE(stride >= 1, "infer_chains: `program`: expected a stride to pad by, got ", stride);
  const Tensor pixels = x.slice(2, 0, c10::nullopt, stride).slice(3, 0, c10::nullopt, stride);
  return at::constant_pad_nd(pixels, {0, 0, 0, 0, 0, channels - x.size(1)});
}

// y of the chains on x.
//
// Ops has what the device's ops are: fold, which makes of the norms what the others take of each; norm_relu;
// conv_bn_act, whose last argument allows it to write over the residual and give that; norm_relu_max_pool; and
// pool_normalizes, whether the norm of a convolution costs less in the pool after it.
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
    const at::MemoryFormat format = format_of(in, filters);  // of all of the chain's results
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
    // The input of a chain is ours but for the first one's, and nobody reads it after the last convolution has
    // begun, if that is not its own input.
    const bool ours = chain.shortcut != Shortcut::kIdentity || !in.is_same(x);
    in = Tensor();
    for (int64_t i = 0; i < n; ++i) {
      const bool last = i == n - 1;
      const bool pool = last && !w.empty();  // which does the ReLU
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
