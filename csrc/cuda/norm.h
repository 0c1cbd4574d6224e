// The memory-bound ops on a GPU, without torch. Each call launches on `stream` and returns the launch's error. The
// caller must guarantee that every size is at least 1. T: float, double, bf16 or fp16.
#pragma once

#include "device.h"

namespace resnet_fast::cuda {

// y and the mask: one launch.
template <class T>
cudaError_t bn_act(const BnAct<T>&, cudaStream_t stream);

// y and the index: one launch.
template <class T>
cudaError_t bn_relu_max_pool(const BnReluMaxPool<T>&, cudaStream_t stream);

// dz: one launch.
template <class T>
cudaError_t bn_act_bwd_apply(const BnActBwdApply<T>&, cudaStream_t stream);

// The number of partial results per channel in a reduction over a tensor's pixels.
int64_t reduction_splits(const Shape&, int multiprocessors);

// Σg, Σg·xhat(z[0]), Σg·xhat(z[1]) into sums[0..2] (where not null) by two launches; the second merges `partial`,
// 3·splits·channels values. With `out`: finishes a dgrad, without mask and z[1]; it reads x, its mean[0] and its
// rstd[0], and writes g. With `index`: the gradient through a max-pool, which writes g to `out`. Both are one launch
// where sums[0] is null.
template <class T>
cudaError_t gradient_sums(
    const GradientSums<T>&, int64_t splits, accumulate_t<T>* partial, accumulate_t<T>* const sums[3], cudaStream_t stream);

// mean and m2 = Σ(x − mean)² by two launches; the second merges `partial`, (4·splits + 1)·channels values.
template <class T>
cudaError_t bn_stats(
    const Statistics<T>&, int64_t splits, accumulate_t<T>* partial, accumulate_t<T>* mean, accumulate_t<T>* m2,
    cudaStream_t stream);

// Vectors of `channels` values, A: float or double; a null weight is 1, a null bias 0. One launch each.
template <class A>
struct Finalize {
  const A *mean, *m2, *weight, *bias;
  A *scale, *shift, *rstd;
  int64_t channels, count;
  double eps;
};
template <class A>
cudaError_t bn_finalize(const Finalize<A>&, cudaStream_t stream);

template <class A>
struct FinalizeGradient {
  const A *sum_dy, *sum_dy_xhat, *scale, *rstd;
  A *b, *c;
  int64_t channels, count;
};
template <class A>
cudaError_t bn_bwd_finalize(const FinalizeGradient<A>&, cudaStream_t stream);

// scale and shift of up to kFolds norms in inference, each with the bias of the convolution before it, in one launch.
//   scale = weight/√(var + eps)    shift = bias − (mean − conv_bias)·scale
// Vectors have the model's dtypes; a null one is missing. Without a mean var is 1, and the
// norm is weight·(z + conv_bias) + bias. scale is stored from results[first], shift `folded_size` values later.
struct Fold {
  enum Vector { kWeight, kBias, kMean, kVar, kConvBias, kVectors };
  const void* vectors[kVectors];
  Dtype dtypes[kVectors];
  int32_t channels, first;
  double eps;
};
constexpr int64_t folded_size(int64_t channels) { return (channels + 7) / 8 * 8; }  // vectors start at 16 bytes

constexpr int kFolds = 60;  // kernel arguments are limited to 4 KB
template <class A>
struct Folds {
  Fold of[kFolds];
  int count;
  A* results;
};
template <class A>
cudaError_t fold(const Folds<A>&, cudaStream_t stream);

// y[n, c] = mean of x[n, c] over its pixels: one launch.
template <class T>
struct GlobalAvgPool {
  Shape shape;  // of x
  int64_t images;
  const T* x;
  T* y;
};
template <class T>
cudaError_t global_avg_pool(const GlobalAvgPool<T>&, cudaStream_t stream);

}  // namespace resnet_fast::cuda

// Explicit instantiations for every dtype: RESNET_FAST_FOR_EACH_DTYPE(X), where X(T) ends in ';'.
#define RESNET_FAST_FOR_EACH_DTYPE(X) X(float) X(double) X(bf16) X(fp16)
