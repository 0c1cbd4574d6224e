// Inference convolutions with packed filters. Filters are packed once, for our tiles (tiled_conv.h) or for oneDNN, and
// cached beside the scale and shift of their norm.
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

// Who convolves on a CPU, and why. Tiles take NHWC, one group, float or bf16, a CPU and channel counts that
// tiled_conv_takes. In fp32 inference on Intel oneDNN measures faster, but for what goes by Winograd's products and for
// pointwise convolutions whose pixels outweigh their filters: those are as fast, and with a residual faster (ResNet-50).
// settings().cpu_conv decides otherwise.
struct Route {
  const char* by;  // "tiles", "winograd", "onednn" (filters packed for it) or "aten"
  const char* why;
  bool tiled;
};
Route route(const Tensor& x, const Tensor& w, const Geometry& geometry, bool inference = false);

// Filters, as panels of tiled_conv.h or in x's dtype and oneDNN's blocked layout where it has one, and the vectors of
// y = scale·conv + shift, in the dtype that x is summed in. A scale in the filters would round each filter once more;
// a mean far from zero magnifies that error.
struct PackedConv {
  Tensor weight;           // undefined where w is read as it is
  OptTensor scale, shift;  // neither where there is neither a norm nor a bias
  bool panels = false;
};

// The packed form of these very tensors for inputs like x: one that is kept (memory.h) while every one of them holds
// what it held (witness.h), else a new one.
PackedConv pack(const Tensor& x, const Tensor& w, const BatchNorm& norm, const Geometry& geometry);

// While one lives, pack() on its thread uses what is kept without comparing values. was_right() compares them, of all
// that was used, on all threads; where it says no, the results have to be computed again.
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

// relu(scale·conv(x) + shift + residual) of filters of w's shape and memory order; NaN stays NaN. With `over` the
// result may be written over the residual, which then is what is given.
Tensor run_packed(
    const Tensor& x, const Tensor& w, const PackedConv& packed, const OptTensor& residual, bool relu,
    const Geometry& geometry, bool over);

// ATen's convolution and its gradients (those that are asked for), around the faults of oneDNN 3.x:
//   it writes out of bounds where windows lie in the padding alone      the padding is made before
//   so does dw of a strided 1x1 unless channels are a multiple of 16    the pixels that it reads are gathered before
//   dw in bf16 of one or two columns with a stride is uninitialized     computed in fp32
//   bf16 on AMX fails for the geometries of onednn_takes_bf16           computed in fp32
Tensor conv2d(const Tensor& x, const Tensor& w, const Geometry& geometry);
std::tuple<Tensor, Tensor> conv2d_backward(
    const Tensor& dz, const Tensor& x, const Tensor& w, const Geometry& geometry, bool need_dx, bool need_dw);

// Drop what was packed of filters at `address`, and of tensors that are no more.
void drop_packed(int64_t address);

}  // namespace resnet_fast::cpu
