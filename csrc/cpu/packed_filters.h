// Inference convolutions with packed filters. Filters are packed once, for resnet_fast's tiles (tiled_conv.h) or for
// oneDNN, and cached with the scale and shift of their norm.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "memory.h"
#include "tiled_conv.h"

namespace resnet_fast::cpu {

// Which implementation convolves on a CPU, and why. Tiles take NHWC, float or bf16, and a CPU, groups and channels that
// tiled_conv_takes. In fp32 inference on Intel, oneDNN measures faster. Exceptions use the tiles: Winograd,
// and pointwise convolutions with more pixel values than filter values, which are as fast as oneDNN's, and faster with
// a residual (ResNet-50). settings().cpu_conv overrides the choice.
struct Route {
  const char* by;  // "tiles", "winograd", "onednn" (filters packed for it) or "aten"
  const char* why;
  bool tiled;
};
enum class Use { kInference, kForward, kBackward };  // the last two in training
Route route(const Tensor& x, const Tensor& w, const Geometry& geometry, Use use);

// Packed filters (panels of tiled_conv.h, or x's dtype in oneDNN's blocked layout where it has one), and the vectors of
// y = scale·conv + shift, in x's accumulation dtype. Scaling the filters instead would round each filter once more,
// and a mean far from zero magnifies that error.
struct PackedConv {
  Tensor weight;           // undefined where w is read directly
  OptTensor scale, shift;  // empty without a norm and a bias
  bool panels = false;
};

// The packed form of these tensors for inputs like x: from the cache (memory.h) if no tensor has changed (witness.h),
// else a new one.
PackedConv pack(const Tensor& x, const Tensor& w, const BatchNorm& norm, const Geometry& geometry);

// While a Trust exists, pack() on its thread uses cached entries without comparing values. was_right() then compares
// the values of all entries used, on all threads; if it returns false, the results must be computed again.
class Trust {
 public:
  Trust();
  ~Trust();
  bool was_right();
  void note(std::shared_ptr<Kept> entry, std::vector<Tensor> tensors);

  static Trust* here();

 private:
  Trust* const outer_;
  std::vector<std::pair<std::shared_ptr<Kept>, std::vector<Tensor>>> used_;
};

// relu(scale·conv(x) + shift + residual) with filters of w's shape and memory format; NaN stays NaN. With `over` the
// result may overwrite the residual, which then is returned.
Tensor run_packed(
    const Tensor& x, const Tensor& w, const PackedConv& packed, const OptTensor& residual, bool relu,
    const Geometry& geometry, bool over);

// ATen's convolution and the requested gradients, with workarounds for bugs of oneDNN 3.x:
//   windows entirely in the padding: it writes out of bounds                 x is padded before
//   dw of a strided 1x1, channels not multiples of 16: the same              the pixels it reads are gathered before
//   dw in bf16 with one or two columns and a stride: uninitialized values    computed in fp32
//   bf16 on AMX for the geometries that onednn_takes_bf16 excludes           computed in fp32
Tensor conv2d(const Tensor& x, const Tensor& w, const Geometry& geometry);
std::tuple<Tensor, Tensor> conv2d_backward(
    const Tensor& dz, const Tensor& x, const Tensor& w, const Geometry& geometry, bool need_dx, bool need_dw);

// Drops the packed copies of filters at `address`, and of freed tensors.
void drop_packed(int64_t address);

}  // namespace resnet_fast::cpu
