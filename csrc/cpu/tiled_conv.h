// Our own NHWC convolutions for CPUs with AVX-512: implicit GEMM in bands of output rows that stay in the
// L2 cache, so that what comes before a convolution (normalization, ReLU, BN backward) is done as its input
// is laid out, and what comes after (statistics, ReLU gradient, sums) while its output is still there.
// 3x3 convolutions of fp32 take Winograd's way where it is faster (winograd.h), likewise in blocks.
#pragma once

#include <ATen/ATen.h>

#include <functional>

#include "kernels.h"
#include "memory.h"

namespace resnet_fast::cpu {

// Lay pixels [begin, end) of row `row` of image `image` out at `to`.
template <class T>
using FillRow = std::function<void(int64_t image, int64_t row, int64_t begin, int64_t end, T* to)>;

// Called when pixels [begin, end) of y (counted over all images) are finished, by task `task`.
using Finish = std::function<void(int64_t task, int64_t begin, int64_t end)>;

// Whether this CPU has tiles for T and the channel counts fit them.
template <class T>
bool tiled_conv_takes(const ConvShape& shape);

// Whether its products are Winograd's (winograd.h), in a convolution of fp32.
bool by_winograd(const ConvShape& shape, bool dgrad);

// Filters [K,C,R,S] (float or T) as panels for fprop of the shape, or for its dgrad, in memory by `allocate`.
template <class T>
at::Tensor pack_filters(
    const ConvShape& shape, const at::Tensor& w, bool for_dgrad, Allocate allocate = &empty_bytes);

constexpr int64_t kTasks = 64;  // bands are dealt to at most this many tasks, each with sums of its own

// y = relu(scale·conv(x) + shift + residual); what is null is not there. x is read in place, or row by row through
// `fill`.
template <class T>
void tiled_conv_fprop(
    const ConvShape& shape, const T* x, const FillRow<T>& fill, const at::Tensor& panels, const float* scale,
    const float* shift, const T* residual, bool relu, T* y, const Finish& finish);

// dx of the convolution of `shape`. Where `fill` is given it completes pixels of dz in place before they are
// read (pointwise convolutions only: their bands do not overlap).
template <class T>
void tiled_conv_dgrad(
    const ConvShape& shape, const T* dz, const FillRow<T>& fill, const at::Tensor& panels, T* dx,
    const Finish& finish);

// dw [K,R,S,C] in fp32.
template <class T>
at::Tensor tiled_conv_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz);

}  // namespace resnet_fast::cpu
