// The memory-bound ops on a GPU, free of torch. Each call launches on `stream` and returns the launch's error;
// every size is at least 1 (the caller leaves out what has no elements). T: float, double, bf16 or fp16.
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

// How many partial results a reduction over the pixels of a tensor makes a channel.
int64_t reduction_splits(const Shape&, int multiprocessors);

// Σg, Σg·xhat(z[0]), Σg·xhat(z[1]) into sums[0..2] (those that are not null) by two launches, the second over
// `partial`, 3·splits·channels values. With `out` it is what follows a dgrad: there is no mask, z[0] is x, z[1]
// is not there, and without sums[0] it is one launch that writes g. With `index` it is the gradient through a
// max-pool, which writes `out` too, also without sums.
template <class T>
cudaError_t gradient_sums(
    const GradientSums<T>&, int64_t splits, accumulate_t<T>* partial, accumulate_t<T>* const sums[3], cudaStream_t stream);

// mean and m2 = Σ(x − mean)² by two launches, the second over `partial`, (4·splits + 1)·channels values.
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

// scale and shift of up to kFolds norms in inference, each with the bias of the convolution before it: one launch.
//   scale = weight/√(var + eps)    shift = bias − (mean − conv_bias)·scale
// Vectors are in the dtypes that the model keeps them in; a null one is not there, and without a mean there is no
// norm: 1 and conv_bias. They go to results[first …] and, `folded_size` behind, shift.
struct Fold {
  enum Vector { kWeight, kBias, kMean, kVar, kConvBias, kVectors };
  const void* vectors[kVectors];
  Dtype dtypes[kVectors];
  int32_t channels, first;
  double eps;
};
constexpr int64_t folded_size(int64_t channels) { return (channels + 7) / 8 * 8; }  // vectors start at 16 bytes

constexpr int kFolds = 60;  // a kernel's arguments are 4 KB at most
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

// A .cu file's instantiations for every dtype: RESNET_FAST_FOR_EACH_DTYPE(X) with X(T) ending in ';'.
#define RESNET_FAST_FOR_EACH_DTYPE(X) X(float) X(double) X(bf16) X(fp16)
