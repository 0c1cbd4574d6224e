#include "packed_filters.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <list>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bands.h"
#include "cpu_features.h"
#include "memory.h"
#include "norm.h"
#include "winograd.h"
#include "witness.h"

namespace resnet_fast::cpu {
namespace {

using Key = std::vector<int64_t>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 1469598103934665603ull;
    for (const int64_t word : key) hash = (hash ^ uint64_t(word)) * 1099511628211ull;
    return hash;
  }
};

using Index = std::unordered_map<Key, Shelf::Place, KeyHash>;

Index& entries() {
  static auto* all = new Index;  // never destroyed: torch may be unloaded first
  return *all;
}

int64_t bytes_of(const PackedConv& packed) {
  int64_t bytes = 0;
  for (const OptTensor& t : {OptTensor(packed.weight), packed.scale, packed.shift}) {
    if (t && t->defined()) bytes += t->numel() * t->element_size();
  }
  return bytes;
}

// Packed filters with witnesses of their source tensors, the filter first.
class Entry final : public Kept {
 public:
  Entry(Key key, std::list<Witness> witnesses, PackedConv made)
      : Kept(bytes_of(made), false), key(std::move(key)), packed(std::move(made)), witnesses_(std::move(witnesses)) {}

  void leave_index() override { entries().erase(key); }
  bool same(const std::vector<Tensor>& tensors) const { return all(tensors, &Witness::same); }
  bool holds(const std::vector<Tensor>& tensors) const { return all(tensors, &Witness::holds); }
  bool expired() const {
    return std::any_of(witnesses_.begin(), witnesses_.end(), [](const Witness& w) { return w.expired(); });
  }

  const Key key;
  const PackedConv packed;

 private:
  bool all(const std::vector<Tensor>& tensors, bool (Witness::*says)(const Tensor&) const) const {
    return std::equal(witnesses_.begin(), witnesses_.end(), tensors.begin(), tensors.end(),
                      [says](const Witness& seen, const Tensor& t) { return (seen.*says)(t); });
  }

  const std::list<Witness> witnesses_;
};

Entry& entry(Shelf::Place place) { return static_cast<Entry&>(**place); }

std::vector<Tensor> sources(const Tensor& w, const BatchNorm& bn) {
  std::vector<Tensor> all = {w};
  for (const OptTensor* t : {&bn.conv_bias, &bn.weight, &bn.bias, &bn.running_mean, &bn.running_var}) {
    if (t->has_value()) all.push_back(**t);
  }
  return all;
}

// The dilation, 1 for a single tap: there a dilation has no effect, but makes oneDNN write out of bounds.
std::array<int64_t, 2> dilation_of(const Tensor& w, const Geometry& g) {
  return {w.size(2) == 1 ? 1 : g.dilation[0], w.size(3) == 1 ? 1 : g.dilation[1]};
}

// Whether some windows lie entirely in the padding, on at least one side of x.
bool pads_whole_windows(const Tensor& w, const Geometry& g) {
  for (int i = 0; i < 2; ++i) {
    if (g.padding[i] > g.dilation[i] * (w.size(2 + i) - 1)) return true;
  }
  return false;
}

// Whether oneDNN may convolve in bf16. On CPUs with AMX, oneDNN 3.x writes out of bounds or gives wrong values for a
// dilation together with a stride, for a dilation larger than x (a window can then miss x between two of its taps),
// and for several taps with a stride across a single output column.
bool onednn_takes_bf16(const Tensor& x, const Tensor& w, const Geometry& g) {
  const auto dilation = dilation_of(w, g);
  const bool dilated = dilation[0] > 1 || dilation[1] > 1, strided = g.stride[0] > 1 || g.stride[1] > 1;
  if (dilated && (strided || dilation[0] > x.size(2) || dilation[1] > x.size(3))) return false;
  return w.size(3) == 1 || g.stride[1] == 1 || conv_shape(x, w, g).columns > 1;
}

// x and its padding; x is padded here, with no padding left, where oneDNN cannot pad.
std::pair<Tensor, std::vector<int64_t>> pad_whole_windows(const Tensor& x, const Tensor& w, const Geometry& g) {
  if (!pads_whole_windows(w, g)) return {x, g.padding.vec()};
  return {at::constant_pad_nd(x, {g.padding[1], g.padding[1], g.padding[0], g.padding[0]}), {0, 0}};
}

using Call = std::vector<c10::IValue>;

// oneDNN's convolutions with packed filters, registered by ATen; missing if ATen was built without oneDNN.
struct OneDnn {
  std::optional<c10::OperatorHandle> plain, binary_over, reorder;
  bool takes_bf16 = false;  // true on some CPUs

  OneDnn() {
    auto& dispatcher = c10::Dispatcher::singleton();
    plain = dispatcher.findSchema({"mkldnn::_convolution_pointwise", ""});
    binary_over = dispatcher.findSchema({"mkldnn::_convolution_pointwise_", "binary"});
    reorder = dispatcher.findSchema({"mkldnn::_reorder_convolution_weight", ""});
    if (const auto supports = dispatcher.findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""})) {
      Call stack;
      supports->callBoxed(&stack);
      takes_bf16 = stack.at(0).toBool();
    }
  }
  // float and bf16, x not empty. Excluded for bugs of oneDNN 3.x: one channel (wrong values if y has one column), and
  // windows entirely in the padding (writes out of bounds).
  bool takes(const Tensor& x, const Tensor& w, const Geometry& g) const {
    return plain && reorder && at::globalContext().userEnabledMkldnn() && x.numel() > 0 && x.size(1) > 1 &&
           !pads_whole_windows(w, g) &&
           (x.scalar_type() == at::kFloat ||
            (takes_bf16 && x.scalar_type() == at::kBFloat16 && onednn_takes_bf16(x, w, g)));
  }
};

const OneDnn& onednn() {
  static const OneDnn ops;
  return ops;
}

int64_t bits_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

Key make_key(const Tensor& x, const Tensor& w, const BatchNorm& bn, const Geometry& g) {
  Key key = {reinterpret_cast<int64_t>(w.const_data_ptr()), int64_t(x.scalar_type()), g.groups, bits_of(bn.eps),
             at::get_num_threads(), onednn().takes(x, w, g)};
  // oneDNN's layout depends on the input's size; that of the tiles on whether Winograd's filters are kept.
  if (route(x, w, g, Use::kInference).tiled) {
    const ConvShape s = conv_shape(x, w, g);
    const bool single = x.scalar_type() == at::kFloat;
    const bool u = single ? winograd_keeps<float>(s) : winograd_keeps<bf16>(s);
    key.push_back(!u ? 0 : single ? winograd_tile<float>(s) : winograd_tile<bf16>(s));
  } else {
    key.insert(key.end(), x.sizes().begin(), x.sizes().end());
  }
  for (const at::IntArrayRef part : {w.sizes(), w.strides(), g.stride, g.padding, g.dilation}) {
    key.insert(key.end(), part.begin(), part.end());
  }
  for (const OptTensor* t : {&bn.conv_bias, &bn.weight, &bn.bias, &bn.running_mean, &bn.running_var}) {
    key.push_back(t->has_value() ? reinterpret_cast<int64_t>((*t)->const_data_ptr()) : 0);
  }
  return key;
}

Tensor call(const c10::OperatorHandle& op, Call stack) {
  const InOneDnn inside;
  op.callBoxed(&stack);
  return stack.at(0).toTensor();
}

std::vector<int64_t> list(at::IntArrayRef values) { return values.vec(); }

PackedConv make(const Tensor& x, const Tensor& w, const BatchNorm& bn, const Geometry& g) {
  PackedConv packed;
  std::tie(packed.scale, packed.shift) = scale_and_shift(x, bn);
  if (route(x, w, g, Use::kInference).tiled) {
    const ConvShape s = conv_shape(x, w, g);
    packed.panels = true;
    packed.weight = x.scalar_type() == at::kFloat ? pack_filters<float>(s, w, false, &empty_kept)
                                                  : pack_filters<bf16>(s, w, false, &empty_kept);
    return packed;
  }
  const Tensor weight = w.to(x.scalar_type());
  if (onednn().takes(x, w, g)) {
    packed.weight = call(*onednn().reorder, {weight, list(g.padding), list(g.stride), list(dilation_of(w, g)),
                                             g.groups, c10::IValue(list(x.sizes()))});
  } else if (!weight.is_same(w)) {
    packed.weight = weight;
  }
  return packed;
}

// Takes the entries at `address` and those of freed tensors; the caller must hold the lock.
Shelf::Items take_gone(Shelf& shelf, int64_t address) {
  std::vector<Shelf::Place> places;
  for (const auto& [key, place] : entries()) {
    if (key[0] == address || entry(place).expired()) places.push_back(place);
  }
  Shelf::Items taken;
  for (const Shelf::Place place : places) taken.splice(taken.end(), shelf.take(place));
  return taken;
}

}  // namespace

PackedConv pack(const Tensor& x, const Tensor& w, const BatchNorm& bn, const Geometry& geometry) {
  std::vector<Tensor> tensors = sources(w, bn);
  for (const Tensor& t : tensors) {
    if (t.is_inference()) return make(x, w, bn, geometry);  // it has no version counter
  }
  Shelf& shelf = Shelf::get();
  const Key key = make_key(x, w, bn, geometry);
  Shelf::Item seen;
  {
    const std::lock_guard<std::mutex> lock(shelf.mutex);
    if (const auto found = entries().find(key); found != entries().end()) {
      seen = *found->second;
      shelf.use(found->second);
    }
  }
  if (const auto* found = static_cast<const Entry*>(seen.get())) {
    if (Trust* trust = Trust::here(); trust != nullptr && found->same(tensors)) {
      trust->note(seen, std::move(tensors));
      return found->packed;
    }
    if (found->holds(tensors)) return found->packed;
  }

  std::list<Witness> witnesses;
  for (const Tensor& t : tensors) witnesses.emplace_back(t);
  const auto made = std::make_shared<Entry>(key, std::move(witnesses), make(x, w, bn, geometry));
  Shelf::Items taken;
  const std::lock_guard<std::mutex> lock(shelf.mutex);
  taken = take_gone(shelf, 0);
  if (const auto old = entries().find(key); old != entries().end()) {
    taken.splice(taken.end(), shelf.take(old->second));
  }
  entries().emplace(key, shelf.put(made));
  taken.splice(taken.end(), shelf.excess());
  return made->packed;
}

namespace {

Trust*& innermost() {
  thread_local Trust* trust = nullptr;
  return trust;
}

}  // namespace

Trust::Trust() : outer_(std::exchange(innermost(), this)) {}
Trust::~Trust() { innermost() = outer_; }
Trust* Trust::here() { return innermost(); }

void Trust::note(std::shared_ptr<Kept> entry, std::vector<Tensor> tensors) {
  used_.emplace_back(std::move(entry), std::move(tensors));
}

bool Trust::was_right() {
  std::atomic<bool> right{true};
  for_tasks(int64_t(used_.size()), [&](int64_t i) {
    const auto& [item, tensors] = used_[used_.size() - 1 - i];  // a network's last filters are its largest
    if (static_cast<const Entry&>(*item).holds(tensors)) return;
    right = false;
    drop_packed(reinterpret_cast<int64_t>(tensors[0].const_data_ptr()));
  });
  used_.clear();
  return right;
}

Route route(const Tensor& x, const Tensor& w, const Geometry& g, Use use) {
  const bool inference = use == Use::kInference;
  const auto library = [&](const char* why) {
    return Route{inference && onednn().takes(x, w, g) ? "onednn" : "aten", why, false};
  };
  if (conv_by() == ConvBy::OneDnn) return library("RESNET_FAST_CPU_CONV=onednn");
  // Their tiles are not measured on Intel with AVX-512.
  const bool intel = is_intel() && active_isa() >= Isa::AVX512;
  if (g.groups != 1 && intel && conv_by() == ConvBy::Auto) return library("groups > 1");
  if (format_of(x, &w) != at::MemoryFormat::ChannelsLast) return library("not channels_last");
  const bool single = x.scalar_type() == at::kFloat;
  if (!single && x.scalar_type() != at::kBFloat16) return library("neither fp32 nor bf16");
  const ConvShape s = conv_shape(x, w, g);
  const bool merges = single ? tiled_fprop_merges<float>(s) : tiled_fprop_merges<bf16>(s);
  if (use != Use::kBackward && merges) return {"tiles", "few channels", true};
  if (!(single ? tiled_conv_takes<float>(s) : tiled_conv_takes<bf16>(s))) {
    return library("channels or filters are not multiples of 32 (of up to 4 groups: of 8, with AVX-512 of 16), or the "
                   "CPU has no tiles");
  }
  if (single ? by_winograd<float>(s, false) : by_winograd<bf16>(s, false)) {
    return {"winograd", "fp32 arithmetic, 3x3, stride 1", true};
  }
  const int64_t values = s.images * s.rows * s.columns * (s.channels + s.filters);
  const bool streams = s.pointwise() && values > s.channels * s.filters;
  if (inference && single && conv_by() == ConvBy::Auto && intel && !streams && onednn().takes(x, w, g)) {
    return library("fp32 inference on Intel");
  }
  if (g.groups > 1) {
    return {"tiles", "channels and filters of up to 4 groups are multiples of 8 (with AVX-512 of 16)", true};
  }
  return {"tiles", "channels and filters are multiples of 32", true};
}

namespace {

// Empty if the tiles cannot convolve these values (tiled_conv_fprop).
template <class T>
OptTensor run_panels(
    const Tensor& x, const Tensor& w, const PackedConv& packed, const OptTensor& residual, bool relu,
    const Geometry& g, bool over) {
  const ConvShape s = conv_shape(x, w, g);
  const bool reuses = over && !tiled_conv_needs_finite<T>(s);
  const Tensor y = reuses ? *residual : empty({s.images, s.filters, s.rows, s.columns}, x.options(),
                                              at::MemoryFormat::ChannelsLast);
  const bool done = tiled_conv_fprop<T>(
      s, data<T>(x), {}, packed.weight, data<float>(packed.scale), data<float>(packed.shift), data<T>(residual), relu,
      static_cast<T*>(y.data_ptr()), {});
  return done ? OptTensor(y) : OptTensor();
}

// conv(x) with oneDNN. The C library allocates blocks of over 32 MB from the system at every call. A result of that
// size is instead added to zeros in cached memory (memory.h): writing and reading them costs less than page faults.
// ResNet-50's stem at batch 16 takes 17 ms, and 27 ms with the faults. ATen's fused sum takes only channels_last
// operands; in older releases none that are also contiguous (a single pixel or channel).
Tensor run_onednn(const Tensor& x, const Tensor& w, const PackedConv& packed, const Geometry& g) {
  constexpr int64_t kMapped = 32 << 20;
  const ConvShape s = conv_shape(x, w, g);
  const auto convolve = [&](const c10::OperatorHandle& op, Call first, const Call& last) {
    first.insert(first.end(), {list(g.padding), list(g.stride), list(dilation_of(w, g)), g.groups});
    first.insert(first.end(), last.begin(), last.end());
    return call(op, std::move(first));
  };
  const c10::List<std::optional<at::Scalar>> none;
  const int64_t bytes = s.images * s.rows * s.columns * s.filters * int64_t(x.element_size());
  if (bytes > kMapped && onednn().binary_over && g.groups == 1 && !x.is_contiguous()) {
    const Tensor y = empty({s.images, s.filters, s.rows, s.columns}, x.options(), at::MemoryFormat::ChannelsLast);
    if (!y.is_contiguous()) {
      return convolve(*onednn().binary_over, {y.zero_(), x, packed.weight, c10::IValue()},
                      {"add", c10::IValue(), c10::IValue(), none, c10::IValue()});
    }
  }
  return convolve(*onednn().plain, {x, packed.weight, c10::IValue()}, {"none", none, c10::IValue()});
}

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& w, const Geometry& g) {
  const InOneDnn inside;
  if (x.scalar_type() == at::kBFloat16 && !onednn_takes_bf16(x, w, g)) {
    return conv2d(x.to(at::kFloat), w.to(at::kFloat), g).to(at::kBFloat16);
  }
  const auto [in, padding] = pad_whole_windows(x, w, g);
  return at::conv2d(in, w, {}, g.stride, padding, g.dilation, g.groups);
}

std::tuple<Tensor, Tensor> conv2d_backward(
    const Tensor& dz, const Tensor& x, const Tensor& w, const Geometry& g, bool need_dx, bool need_dw) {
  const InOneDnn inside;
  const bool narrow = x.size(3) <= 2 && g.stride[1] > 1 && need_dw;
  if (x.scalar_type() == at::kBFloat16 && (narrow || !onednn_takes_bf16(x, w, g))) {
    const auto [dx, dw] = conv2d_backward(dz.to(at::kFloat), x.to(at::kFloat), w.to(at::kFloat), g, need_dx, need_dw);
    return {need_dx ? dx.to(x.scalar_type()) : dx, need_dw ? dw.to(w.scalar_type()) : dw};
  }
  const auto [in, padding] = pad_whole_windows(x, w, g);
  const auto pixels = [&](const Tensor& t) {  // those that a single tap reads
    return t.slice(2, 0, c10::nullopt, g.stride[0]).slice(3, 0, c10::nullopt, g.stride[1]);
  };
  const bool gathers = w.size(2) * w.size(3) == 1 && g.stride[0] * g.stride[1] > 1 && w.size(1) % 16 != 0;
  const std::vector<int64_t> one = {1, 1};
  auto [dx, dw, db] = at::convolution_backward(
      dz, gathers ? pixels(in).contiguous(in.suggest_memory_format()) : in, w, at::nullopt,
      gathers ? at::IntArrayRef(one) : g.stride, padding, g.dilation, false, {0, 0}, g.groups,
      {need_dx, need_dw, false});
  if (!need_dx) return {dx, dw};
  if (gathers) {
    const Tensor all = at::zeros_like(in);
    pixels(all).copy_(dx);
    dx = all;
  }
  if (in.is_same(x)) return {dx, dw};
  return {dx.narrow(2, g.padding[0], x.size(2)).narrow(3, g.padding[1], x.size(3)), dw};
}

Tensor run_packed(
    const Tensor& x, const Tensor& w, const PackedConv& packed, const OptTensor& residual, bool relu,
    const Geometry& g, bool over) {
  if (packed.panels) {
    const auto run = x.scalar_type() == at::kFloat ? run_panels<float> : run_panels<bf16>;
    if (const OptTensor y = run(x, w, packed, residual, relu, g, over)) return *y;
  }
  const Tensor weight = !packed.panels && packed.weight.defined() ? packed.weight : w.to(x.scalar_type());
  const bool by_onednn = !packed.panels && onednn().takes(x, w, g);
  const Tensor y = (by_onednn ? run_onednn(x, w, packed, g) : conv2d(x, weight, g)).contiguous(format_of(x, &w));
  // Not oneDNN's ReLU, which returns 0 for NaN.
  if (relu || residual || packed.scale) bn_act_over(y, packed.scale, packed.shift, residual, relu);
  return y;
}

void drop_packed(int64_t address) {
  Shelf& shelf = Shelf::get();
  Shelf::Items taken;
  const std::lock_guard<std::mutex> lock(shelf.mutex);
  taken = take_gone(shelf, address);
}

}  // namespace resnet_fast::cpu
