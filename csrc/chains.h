// Inference of chains of resnet_fast/chain.py, one after another, in one call: no Python and no dispatcher between
// their convolutions, and an addition may write over a tensor that nobody else will read.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "tensors.h"

namespace resnet_fast {

using TensorList = c10::List<OptTensor>;

// What a chain adds to its last convolution; the numbers are SHORTCUTS of resnet_fast/inference.py.
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

// Every stride-th pixel of x and zeros in the channels that it does not have (option A of He et al. 2015).
inline Tensor zero_pad(const Tensor& x, int64_t channels, int64_t stride) {
  const Tensor pixels = x.slice(2, 0, c10::nullopt, stride).slice(3, 0, c10::nullopt, stride);
  return at::constant_pad_nd(pixels, {0, 0, 0, 0, 0, channels - x.size(1)});
}

// y of the chains on x. For each, `program` holds
//   n, shortcut, relu, pools, and the stride of a zero-padding shortcut (else 0),
//   stride[2] padding[2] dilation[2] groups of its n convolutions and of a projection,
//   kernel[2] stride[2] padding[2] of a pool;
// `tensors` weight and bias of those convolutions, then weight, bias, running mean and running variance of the norm
// before the first convolution, of those after each, and of the projection's; `eps` one number a norm.
//
// Ops has what the device's ops are: norm_relu, conv_bn_act (whose last argument allows it to write over the
// residual and give that) and max_pool.
template <class Ops>
Tensor infer_chains(const Tensor& x, const TensorList& tensors, at::IntArrayRef program, at::ArrayRef<double> eps) {
  TORCH_CHECK_VALUE(x.dim() == 4, "infer_chains: `x`: expected 4 dimensions, got ", x.dim());
  Words words(program);
  size_t first = 0, norms = 0;
  Tensor in = x;
  while (!words.done()) {
    const int64_t n = words.next();
    const auto shortcut = Shortcut(words.next());
    const bool relu = words.next() != 0, pools = words.next() != 0;
    const int64_t pad_stride = words.next();
    TORCH_CHECK_VALUE(n >= 1 && n <= int64_t(program.size()),
                      "infer_chains: `program`: expected 1 or more convolutions in every chain, got ", n);
    const int64_t convs = n + (shortcut == Shortcut::kProjection);
    const at::IntArrayRef geometry = words.take(7 * convs), windows = words.take(pools ? 6 : 0);
    const size_t first_norm = first + 2 * convs;
    TORCH_CHECK_VALUE(first_norm + 4 * (n + 2) <= tensors.size() && norms + n + 2 <= eps.size(),
                      "infer_chains: `tensors` and `eps`: expected more for chain of ", n, " convolutions");

    const auto tensor = [&](size_t i) { return OptTensor(tensors.get(i)); };
    const auto norm = [&](int64_t i) {
      const size_t at = first_norm + 4 * i;
      return BatchNorm{tensor(at), tensor(at + 1), tensor(at + 2), tensor(at + 3), eps[norms + i]};
    };
    const OptTensor w0 = tensor(first);
    const at::MemoryFormat format = format_of(in, w0 ? &*w0 : nullptr);  // of all of the chain's results
    const auto convolve = [&](int64_t i, const Tensor& h, const OptTensor& residual, bool activate, bool over) {
      const OptTensor weight = tensor(first + 2 * i);
      TORCH_CHECK_VALUE(weight.has_value(), "infer_chains: `tensors`: expected filters, got None");
      const at::IntArrayRef g = geometry.slice(7 * i, 7);
      const Geometry shape = {g.slice(0, 2), g.slice(2, 2), g.slice(4, 2), g[6]};
      return Ops::conv_bn_act(h, *weight, tensor(first + 2 * i + 1), norm(i + 1), residual, activate, shape, over)
          .contiguous(format);
    };

    Tensor h = in;
    if (const BatchNorm before = norm(0); before.running_mean) h = Ops::norm_relu(in, before);
    OptTensor skip;
    if (shortcut == Shortcut::kIdentity) skip = in;
    if (shortcut == Shortcut::kProjection) skip = convolve(n, h, {}, false, false);
    if (shortcut == Shortcut::kZeroPad) {
      const OptTensor w = tensor(first + 2 * (n - 1));
      TORCH_CHECK_VALUE(w && pad_stride >= 1, "infer_chains: `program`: expected filters and a stride to pad by");
      skip = zero_pad(in, w->size(0), pad_stride);
    }
    // The input of a chain is ours but for the first one's, and nobody reads it after the last convolution has
    // begun, if that is not its own input.
    const bool ours = shortcut != Shortcut::kIdentity || !in.is_same(x);
    in = Tensor();
    for (int64_t i = 0; i < n; ++i) {
      const bool last = i == n - 1;
      const bool over = last && skip && ours && !h.is_alias_of(*skip);
      h = convolve(i, h, last ? skip : OptTensor(), last ? relu : true, over);
    }
    if (pools) h = Ops::max_pool(h, windows.slice(0, 2), windows.slice(2, 2), windows.slice(4, 2));
    in = h;
    first = first_norm + 4 * (n + 2);
    norms += n + 2;
  }
  TORCH_CHECK_VALUE(first == tensors.size() && norms == eps.size(),
                    "infer_chains: `tensors` and `eps`: expected ", first, " and ", norms, ", got ", tensors.size(),
                    " and ", eps.size());
  return in;
}

}  // namespace resnet_fast
