// Inference convolutions with BN folded into filters that are packed once, for our tiles (engine.h) or
// for oneDNN, and kept.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "../tensors.h"
#include "engine.h"

namespace resnet_fast::cpu {

// Whether our own tiles run it: NHWC, one group, float or bf16, a CPU and channel counts that engine_takes.
// In fp32 inference on Intel oneDNN measures faster, but for what goes by Winograd's products and for pointwise
// convolutions whose pixels outweigh their filters: those are as fast, and with a residual faster (ResNet-50).
// RESNET_FAST_CPU_CONV decides otherwise.
bool tiled(const Tensor& x, const Tensor& w, const Geometry& geometry, bool inference = false);

// Filters times scale and the shift: as panels of engine.h with an fp32 shift, or in x's dtype and oneDNN's
// blocked layout where it has one.
struct PackedConv {
  Tensor weight;
  Tensor shift;  // undefined where there is neither a norm nor a bias
  bool panels = false;
};

// The packed form of these very tensors for inputs like x: from the cache while every one of them has its
// storage, version counter and a sample of its values unchanged, else made and cached. (A single value written
// past the version counter, through `.data` or a NumPy view, can go unseen until clear_packed.)
PackedConv pack(const Tensor& x, const Tensor& w, const BatchNorm& norm, const Geometry& geometry);

// relu(conv(x) + shift + residual) in one call; w tells the filters' shape and memory order. With `over` the
// result may be written over the residual, which then is what is given.
Tensor run_packed(
    const Tensor& x, const Tensor& w, const PackedConv& packed, const OptTensor& residual, bool relu,
    const Geometry& geometry, bool over);

// Drop every packed filter; how many there were.
int64_t clear_packed();

}  // namespace resnet_fast::cpu
