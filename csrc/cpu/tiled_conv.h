// resnet_fast's NHWC convolutions for CPUs with AVX2 or AVX-512: implicit GEMM in bands of output rows that stay in the L2
// cache. The prologue (normalization, ReLU, BatchNorm backward) runs while a band's input is copied, and the epilogue
// (statistics, ReLU gradient, sums) while its output is in cache. 3x3 convolutions in fp32 arithmetic use Winograd
// where it is faster (winograd.h), also in blocks.
#pragma once

#include <ATen/ATen.h>

#include <functional>

#include "kernels.h"
#include "memory.h"

namespace resnet_fast::cpu {

// Writes pixels [begin, end) of row `row` of image `image` to `to`.
template <class T>
using FillRow = std::function<void(int64_t image, int64_t row, int64_t begin, int64_t end, T* to)>;

// Called by task `task` when pixels [begin, end) of y (counted over all images) are finished.
using Finish = std::function<void(int64_t task, int64_t begin, int64_t end)>;

constexpr int64_t kMostGroups = 4;

// Whether this CPU has tiles for T, and channels and filters are multiples of 32. With several groups, those of a group
// are multiples of 8 (with AVX-512 of 16), or those of up to kMostGroups adjacent groups, which are multiplied as one
// with zeros.
template <class T>
bool tiled_conv_takes(const ConvShape& shape);

// Whether tiled_conv_fprop may return false: groups that are multiplied as one, where a filter multiplies channels that
// it does not read by zero, and Winograd's 4x4 tiles, where an output depends on pixels beside its window.
template <class T>
bool tiled_conv_needs_finite(const ConvShape& shape);

// Whether tiled_conv_fprop also takes a convolution of fewer channels (a network's first), without dilation of columns
// and not by AMX. The values that a row of taps reads (up to 256) are adjacent, and are multiplied like one tap's. In
// pairs of bf16, an infinity may become NaN if their number is odd.
template <class T>
bool tiled_fprop_merges(const ConvShape& shape);

// The tile size of Winograd (winograd.h), 0 if it does not convolve this shape.
template <class T>
int by_winograd(const ConvShape& shape, bool dgrad);

// Packs filters [K,C,R,S] (float or T) as panels for the shape's fprop or dgrad, in memory from `allocate`.
template <class T>
at::Tensor pack_filters(
    const ConvShape& shape, const at::Tensor& w, bool for_dgrad, Allocate allocate = &empty_bytes);

constexpr int64_t kTasks = 64;  // maximum number of tasks that share the bands; each has separate sums

// y = relu(scale·conv(x) + shift + residual); a null operand is missing. x is read in place, or row by row with
// `fill`. Returns false, and y has no meaning, if an infinity or NaN could spread (tiled_conv_needs_finite).
template <class T>
bool tiled_conv_fprop(
    const ConvShape& shape, const T* x, const FillRow<T>& fill, const at::Tensor& panels, const float* scale,
    const float* shift, const T* residual, bool relu, T* y, const Finish& finish);

// dx of the convolution of `shape`. If given, `fill` completes pixels of dz in place before they are read (only for
// pointwise convolutions, whose bands do not overlap). Returns false as tiled_conv_fprop does, for dz.
template <class T>
bool tiled_conv_dgrad(
    const ConvShape& shape, const T* dz, const FillRow<T>& fill, const at::Tensor& panels, T* dx,
    const Finish& finish);

// dw [K,R,S,C] in fp32; undefined if Winograd's 4x4 tiles computed it and it is not finite.
template <class T>
at::Tensor tiled_conv_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz);

}  // namespace resnet_fast::cpu
