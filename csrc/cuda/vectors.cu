// Small ops: coefficients of a norm and of its gradient (one value per channel), and the global average pool.
#include <algorithm>
#include <initializer_list>

#include "norm.h"
#include "walk.h"

namespace resnet_fast::cuda {
namespace {

// scale, shift and rstd of math.h's finalize. Grid: one thread per channel. In double, because where
// |mean| ≫ deviation, shift is a small difference of large numbers.
template <class A>
__global__ void bn_finalize_kernel(const Finalize<A> k) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= k.channels) return;
  const double weight = k.weight ? k.weight[c] : 1.0, bias = k.bias ? k.bias[c] : 0.0;
  const double var = double(k.m2[c]) / double(max(k.count, int64_t(1)));
  const auto r = finalize<A, double>(k.mean[c], var, weight, bias, k.eps, [](double v) { return 1.0 / sqrt(v); });
  k.scale[c] = r.scale, k.shift[c] = r.shift, k.rstd[c] = r.rstd;
}

__device__ __forceinline__ double value(const Fold& k, Fold::Vector which, int c, double missing) {
  const void* vector = k.vectors[which];
  if (vector == nullptr) return missing;
  switch (k.dtypes[which]) {
    case Dtype::kFloat: return static_cast<const float*>(vector)[c];
    case Dtype::kDouble: return static_cast<const double*>(vector)[c];
    case Dtype::kHalf: return number<float>(static_cast<const fp16*>(vector)[c]);
    default: return number<float>(static_cast<const bf16*>(vector)[c]);
  }
}

// scale and shift of each norm in inference (Fold). Grid: channels of the widest norm × norms; a thread per channel.
template <class A>
__global__ void fold_kernel(const Folds<A> all) {
  const Fold& k = all.of[blockIdx.y];
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= k.channels) return;
  const double weight = value(k, Fold::kWeight, c, 1.0), bias = value(k, Fold::kBias, c, 0.0);
  const double conv_bias = value(k, Fold::kConvBias, c, 0.0);
  const bool statistics = k.vectors[Fold::kMean] != nullptr;
  const double mean = value(k, Fold::kMean, c, 0.0) - conv_bias, var = value(k, Fold::kVar, c, 1.0);
  const AffineCoefficients<A> r = finalize<A, double>(
      mean, var, weight, bias, statistics ? k.eps : 0.0, [](double v) { return 1.0 / sqrt(v); });
  A* const to = all.results + k.first + c;
  to[0] = r.scale, to[folded_size(k.channels)] = r.shift;
}

// b and c of math.h's finalize_gradient. Grid: one thread per channel.
template <class A>
__global__ void bn_bwd_finalize_kernel(const FinalizeGradient<A> k) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= k.channels) return;
  const auto r =
      finalize_gradient<A>(k.sum_dy[c], k.sum_dy_xhat[c], k.scale[c], k.rstd[c], A(max(k.count, int64_t(1))));
  k.b[c] = r.b, k.c[c] = r.c;
}

// y[n, c] = Σ over pixels of x[n, c] / pixels, summed in A.
//
// Grid: walk.h's columns of channels × images. The rows of a block share the pixels; a thread loads up to four
// places at once, and one block reduction adds the rows at the end. Bytes moved: x once.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads) global_avg_pool_kernel(const GlobalAvgPool<T> k, int64_t first_image) {
  using A = accumulate_t<T>;
  constexpr int kLanes = NHWC ? kOctet : 1, kTogether = kAtOnce<T, 1>;
  struct alignas(16) Sums {
    A v[kLanes];
  };
  const int64_t image = first_image + blockIdx.y, channels = k.shape.channels;
  const int64_t pixels = k.shape.rows * k.shape.inner / channels / k.images;
  const int64_t column = NHWC ? int64_t(blockIdx.x) * blockDim.x + threadIdx.x : int64_t(blockIdx.x);
  const int64_t channel = NHWC ? column * kOctet : column;
  const int64_t octets = NHWC ? (channels + kOctet - 1) / kOctet : (pixels + kOctet - 1) / kOctet;
  const int64_t places = NHWC ? (column < octets ? pixels : 0) : octets;
  Sums mine = {};
  for (int64_t first = threadIdx.y; first < places; first += kTogether * blockDim.y) {
    Spot spots[kTogether];
    Octet<T> x[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t p = first + j * blockDim.y, left = NHWC ? channels - channel : pixels - p * kOctet;
      spots[j].element = NHWC ? (image * pixels + p) * channels + channel : (image * channels + channel) * pixels + p * kOctet;
      spots[j].count = p < places ? int(min(int64_t(kOctet), left)) : 0;
      if (spots[j].count != 0) x[j] = load<WHOLE>(k.x, spots[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (spots[j].count == 0) continue;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) mine.v[NHWC ? i : 0] += x[j][i];
    }
  }
  const Sums all = merge_down(mine, [](Sums a, const Sums& b) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  });
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if (channel + i < channels) k.y[image * channels + channel + i] = stored<T>(all.v[i] / A(pixels));
  }
}

template <class K>
cudaError_t a_thread_a_channel(void (*kernel)(K), const K& k, cudaStream_t stream) {
  return launch(kernel, dim3(unsigned(ceil_div(k.channels, kThreads))), dim3(kThreads), stream, k);
}

}  // namespace

template <class A>
cudaError_t bn_finalize(const Finalize<A>& k, cudaStream_t stream) {
  return a_thread_a_channel(bn_finalize_kernel<A>, k, stream);
}

template <class A>
cudaError_t fold(const Folds<A>& k, cudaStream_t stream) {
  static_assert(sizeof(Folds<A>) <= 4096);
  int widest = 0;
  for (int i = 0; i < k.count; ++i) widest = std::max(widest, k.of[i].channels);
  if (widest == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div(widest, kThreads)), unsigned(k.count));
  return launch(fold_kernel<A>, grid, dim3(kThreads), stream, k);
}

template <class A>
cudaError_t bn_bwd_finalize(const FinalizeGradient<A>& k, cudaStream_t stream) {
  return a_thread_a_channel(bn_bwd_finalize_kernel<A>, k, stream);
}

template <class T>
cudaError_t global_avg_pool(const GlobalAvgPool<T>& k, cudaStream_t stream) {
  // An image has few pixels: use as many rows of threads as give each thread about four places.
  Walk w = walk(k.shape, 1, 1);
  const int64_t pixels = k.shape.rows * k.shape.inner / k.shape.channels / k.images;
  const int64_t places = k.shape.nhwc ? pixels : ceil_div(pixels, kOctet);
  w.block.y = unsigned(std::min<int64_t>(w.block.y, ceil_div(places, 4)));
  constexpr int64_t kMost = 65535;
  for (int64_t first = 0; first < k.images; first += kMost) {
    w.grid.y = unsigned(std::min(kMost, k.images - first));
    const cudaError_t error = with_layout<T>(k.shape, {k.x}, [&](auto nhwc, auto whole) {
      return launch(global_avg_pool_kernel<T, nhwc.value, whole.value>, w.grid, w.block, stream, k, first);
    });
    if (error) return error;
  }
  return cudaSuccess;
}

template cudaError_t bn_finalize(const Finalize<float>&, cudaStream_t);
template cudaError_t bn_finalize(const Finalize<double>&, cudaStream_t);
template cudaError_t fold(const Folds<float>&, cudaStream_t);
template cudaError_t fold(const Folds<double>&, cudaStream_t);
template cudaError_t bn_bwd_finalize(const FinalizeGradient<float>&, cudaStream_t);
template cudaError_t bn_bwd_finalize(const FinalizeGradient<double>&, cudaStream_t);
#define RESNET_FAST_POOL(T) template cudaError_t global_avg_pool(const GlobalAvgPool<T>&, cudaStream_t);
RESNET_FAST_FOR_EACH_DTYPE(RESNET_FAST_POOL)

}  // namespace resnet_fast::cuda
