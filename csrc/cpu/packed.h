// Inference convolutions with BN folded into filters that are packed once for oneDNN and kept.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace resnet_fast::cpu {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

struct Geometry {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

struct BatchNormTensors {
  OptTensor conv_bias, weight, bias, running_mean, running_var;
  double eps;
};

// Filters times scale, in x's dtype and oneDNN's blocked layout where it has one, and the shift.
struct PackedConv {
  Tensor weight;
  Tensor shift;  // undefined where there is neither a norm nor a bias
};

// The packed form of these very tensors for inputs like x: from the cache while every one of them has its
// storage, version counter and a sample of its values unchanged, else made and cached.
PackedConv pack(const Tensor& x, const Tensor& w, const BatchNormTensors& bn, const Geometry& geometry);

// relu(conv(x) + shift + residual) by oneDNN post-ops in one call.
Tensor run_packed(
    const Tensor& x, const PackedConv& packed, const OptTensor& residual, bool relu, const Geometry& geometry);

// Drop every packed filter; how many there were.
int64_t clear_packed();

}  // namespace resnet_fast::cpu
