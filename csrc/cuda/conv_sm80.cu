// Convolutions on Ampere and later GPUs other than Hopper: CUTLASS' implicit GEMM (cp.async, mma). The epilogue is
// resnet_fast's, because CUTLASS' has one factor for all channels.
#if defined(__CUDA_ARCH__) && !defined(NDEBUG)
#define NDEBUG  // disables CUTLASS' device assertions
#endif

#include <cutlass/conv/kernel/default_conv2d_fprop.h>
#include <cutlass/device_kernel.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <type_traits>

#include "conv_tiles.h"

namespace resnet_fast::cuda::sm80 {
namespace {

using cutlass::gemm::GemmShape;
using cutlass::layout::TensorNHWC;

// Four warps share a tile. The stages fit the 48 KB of shared memory that need no opt-in.
template <int TILE>
struct Tile {
  using Block = GemmShape<kTiles[TILE].m, kTiles[TILE].n, 32>;
  using Warp = GemmShape<Block::kM / 2, Block::kN / 2, 32>;
  static constexpr int kStages = TILE == 0 ? 3 : 4;
};

// Up to eight consecutive blocks have the same pixels and different filters, so their reads of x hit L2.
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

// y = max(lower, scale·sum + shift + residual) for eight channels of one pixel: lower = 0 is ReLU, -inf is no
// activation. A thread stores the same eight channels of all its pixels, so it reads their coefficients once.
template <class T, class Tile>
class Affine {
 public:
  static constexpr int kCount = 8;
  using ElementOutput = T;
  using ElementSource = T;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using Stored = cutlass::Array<T, kCount>;
  using Numbers = cutlass::Array<float, kCount>;
  using FragmentOutput = Stored;
  using FragmentAccumulator = Numbers;
  using ThreadMap = typename cutlass::epilogue::threadblock::DefaultThreadMapTensorOp<
      typename Tile::Block, typename Tile::Warp, 1, T, kCount>::Type;
  static_assert(ThreadMap::Iterations::kColumn == 1);

  struct Params {
    const float *scale, *shift;
    float lower;
    bool has_residual;
    int filters, log_tile;  // of Swizzle
  };

  __device__ explicit Affine(const Params& p) : lower_(p.lower), has_residual_(p.has_residual) {
    const int tile = Swizzle::get_tile_offset(p.log_tile).n();
    const int first = tile * Tile::Block::kN + ThreadMap::initial_offset(threadIdx.x).column();
    for (int i = 0; i < kCount; ++i) {
      const bool there = first < p.filters;  // all eight, or none
      scale_[i] = p.scale != nullptr && there ? p.scale[first + i] : 1.0f;
      shift_[i] = p.shift != nullptr && there ? p.shift[first + i] : 0.0f;
    }
  }

  __device__ bool is_source_needed() const { return has_residual_; }
  __device__ void set_k_partition(int, int) {}  // the sum is never split

  __device__ Stored operator()(const Numbers& sum, const Stored& residual) const {
    return finish(sum, cutlass::NumericArrayConverter<float, T, kCount>()(residual));
  }

  __device__ Stored operator()(const Numbers& sum) const {
    Numbers zero;
    zero.clear();
    return finish(sum, zero);
  }

 private:
  __device__ Stored finish(const Numbers& sum, const Numbers& residual) const {
    Numbers y;
    for (int i = 0; i < kCount; ++i) {
      const float x = fmaf(scale_[i], sum[i], shift_[i]) + residual[i];
      y[i] = cutlass::maximum<float, true>()(x, lower_);  // NaN stays NaN
    }
    return cutlass::NumericArrayConverter<T, float, kCount>()(y);
  }

  Numbers scale_, shift_;
  float lower_;
  bool has_residual_;
};

template <class T, int TILE>
cudaError_t run(const ConvForward& a, cudaStream_t stream) {
  using Tile = Tile<TILE>;
  using Kernel = typename cutlass::conv::kernel::DefaultConv2dFprop<
      T, TensorNHWC, T, TensorNHWC, T, TensorNHWC, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      typename Tile::Block, typename Tile::Warp, GemmShape<16, 8, 16>, Affine<T, Tile>, Swizzle, Tile::kStages,
      cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized,
      cutlass::conv::StrideSupport::kStrided, 8, 8>::Kernel;
  using ThreadMap = typename Kernel::Epilogue::OutputTileIterator::ThreadMap;
  static_assert(std::is_same_v<typename Affine<T, Tile>::ThreadMap, ThreadMap>);
  static_assert(sizeof(typename Kernel::SharedStorage) <= 48 << 10);

  const cutlass::conv::Conv2dProblemSize size(
      a.n, a.h, a.w_, a.c, a.k, a.r, a.s, a.p, a.q, a.padding[0], a.padding[1], a.stride[0], a.stride[1],
      a.dilation[0], a.dilation[1], cutlass::conv::Mode::kCrossCorrelation);
  const auto tensor = [](const void* p, int n, int h, int w, int c) {
    auto* data = static_cast<T*>(const_cast<void*>(p));
    return cutlass::TensorRef<T, TensorNHWC>(data, TensorNHWC::packed({n, h, w, c}));
  };
  typename Kernel::Params params({size, tensor(a.x, a.n, a.h, a.w_, a.c), tensor(a.w, a.k, a.r, a.s, a.c),
                                  tensor(a.residual, a.n, a.p, a.q, a.k), tensor(a.y, a.n, a.p, a.q, a.k), {}});
  params.output_op = {a.scale, a.shift, a.relu ? 0.0f : -std::numeric_limits<float>::infinity(),
                      a.residual != nullptr, a.k, params.swizzle_log_tile};

  cudaLaunchConfig_t config = {};
  config.gridDim = Swizzle::get_grid_shape(params.grid_tiled_shape);
  config.blockDim = Kernel::kThreadCount;
  config.dynamicSmemBytes = sizeof(typename Kernel::SharedStorage);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, cutlass::Kernel<Kernel>, params);
}

template <class T>
cudaError_t run(const ConvForward& a, int tile, cudaStream_t stream) {
  switch (tile) {
    case 0: return run<T, 0>(a, stream);
    case 1: return run<T, 1>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int conv_tiles() { return int(std::size(kTiles)); }

const char* conv_tile_name(int tile) { return kTiles[tile].name; }

int conv_rule(const ConvForward& a, int multiprocessors) { return largest_filling(kTiles, a, multiprocessors); }

// Limits beyond common_refusal: CUTLASS has one bit per row or column of taps, and 32-bit strides.
const char* conv_refusal(const ConvForward& a) {
  if (const char* refusal = common_refusal(a)) return refusal;
  if (a.r > 32 || a.s > 32) return "the filter has more than 32 rows or columns";
  const int64_t x = int64_t(a.h) * a.w_ * a.c, w = int64_t(a.r) * a.s * a.c, y = int64_t(a.p) * a.q * a.k;
  if (std::max({x, w, y}) > INT32_MAX) return "an image or a filter has more than 2^31 - 1 elements";
  return nullptr;
}

cudaError_t conv_forward(const ConvForward& a, int tile, cudaStream_t stream) {
  if (conv_refusal(a) != nullptr) return cudaErrorInvalidValue;
  if (empty_output(a)) return cudaSuccess;
  if (a.dtype == Dtype::kHalf) return run<cutlass::half_t>(a, tile, stream);
  return run<cutlass::bfloat16_t>(a, tile, stream);
}

}  // namespace resnet_fast::cuda::sm80
