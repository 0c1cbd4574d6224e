// The convolution kernels for Hopper: CUTLASS' main loop for convolutions (im2col TMA, wgmma) in its persistent
// GEMM kernels, where the epilogue of one tile overlaps the main loop of the next.
#if defined(__CUDA_ARCH__) && !defined(NDEBUG)
#define NDEBUG  // a device assertion is a function call, and wgmma cannot stay in flight across a call
#endif

#include <cute/tensor.hpp>  // these two first: the builders need but do not include them
#include <cutlass/kernel_hardware_info.h>

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <array>
#include <limits>
#include <type_traits>
#include <unordered_map>

#include "conv_tiles.h"

namespace resnet_fast::cuda::sm90 {
namespace {

using cute::_0;
using cute::_1;
using cute::Int;

// Two warp groups compute: together on tiles of 256 pixels (cooperative), alternately on the others, where one runs its
// main loop while the other stores (pingpong). Tiles of 256 pixels or 128 filters form clusters of two multiprocessors,
// which read the filters once for both.
template <int TILE>
struct Tile {
  static constexpr int kPixels = kTiles[TILE].m, kFilters = kTiles[TILE].n;
  static constexpr bool kCooperative = kPixels == 256;
  using Cluster = cute::Shape<Int<kFilters == 128 || kCooperative ? 2 : 1>, _1, _1>;
  // A step is 64 channels of one tap. The shape is nested because the GEMM's depth is (C, S, R).
  using Shape = cute::Shape<Int<kPixels>, Int<kFilters>, cute::Shape<Int<64>>>;
};

// max(x, lower); NaN stays NaN. lower = 0 is ReLU, -inf is no activation.
struct Lower {
  float lower;
};

template <class X>
struct AtLeast {
  using Arguments = Lower;
};

template <int SIZE>
struct AtLeast<cutlass::Array<float, SIZE>> {
  using X = cutlass::Array<float, SIZE>;
  __device__ __forceinline__ X operator()(X x, Lower bound) const {
    for (int i = 0; i < SIZE; ++i) x[i] = cutlass::maximum<float, true>()(x[i], bound.lower);
    return x;
  }
};

// y = max(lower, present·residual + (scale·sum + shift)), where `present` is 0 or 1. CUTLASS does not load
// a residual with factor 0.
template <class T, class Shape>
struct Fusion {
  template <template <class> class F, class Y>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<F, Y, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class Node, class... Inputs>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Node, Inputs...>;
  using MultiplyAdd = Compute<cutlass::homogeneous_multiply_add, float>;
  using Channels = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Shape, float>;
  using Scalar = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>;
  using Residual = cutlass::epilogue::fusion::Sm90SrcFetch<T>;

  using Affine = Tree<MultiplyAdd, Channels, cutlass::epilogue::fusion::Sm90AccFetch, Channels>;
  using Type = Tree<Compute<AtLeast, T>, Tree<MultiplyAdd, Scalar, Residual, Affine>>;

  static typename Type::Arguments arguments(const ConvForward& a) {
    const float present = a.residual != nullptr ? 1.0f : 0.0f;
    const float lower = a.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    const typename Affine::Arguments affine = {{a.scale, 1.0f}, {}, {a.shift, 0.0f}, {}};
    return {{{{present}}, {}, affine, {}}, {lower}};
  }
};

// Adapts a convolution's main loop to the interface of a GEMM's, because CUTLASS has persistent kernels only for
// GEMMs. Only the loads of the operands differ, and the convolution's main loop does these. The kernel sees
// [pixels, (C, S, R)]·[(C, S, R), K] with a batch of one.
template <class Conv, class KernelSchedule>
struct ConvAsGemm : Conv {
  struct DispatchPolicy : Conv::DispatchPolicy {
    using Schedule = KernelSchedule;
  };
  using StrideA = cute::Stride<int64_t, _1, int64_t>;  // the kernel uses only their rank
  using StrideB = StrideA;
  static constexpr int NumProducerThreadEvents = 1;

  struct Arguments {
    typename Conv::ProblemShape problem;
    typename Conv::Arguments operands;
  };

  template <class GemmShape>
  static typename Conv::Params to_underlying_arguments(const GemmShape&, const Arguments& a, void* workspace) {
    return Conv::to_underlying_arguments(a.problem, a.operands, workspace);
  }

  template <class GemmShape>
  static bool can_implement(const GemmShape&, const Arguments& a) {
    return Conv::can_implement(a.problem, a.operands);
  }

  // The tiles of x and of w. The kernel reads the batch size from a mode after those of w, added here.
  template <class GemmShape>
  __device__ auto load_init(const GemmShape& shape, const typename Conv::Params& params) {
    const auto [x, w] = Conv::load_init(shape, params);
    return cute::make_tuple(x, cute::make_tensor(w.data(), cute::append<5>(w.layout(), cute::Layout<_1, _0>{})));
  }

  // The kernel's iterator over (C, S, R) holds a dangling reference to a shape; this replaces it.
  template <class X, class W, class Block, class Walk, class... Rest>
  __device__ void load(const typename Conv::Params& params, typename Conv::MainloopPipeline pipeline,
                       typename Conv::PipelineState state, const cute::tuple<X, W>& tiles, const Block& block,
                       const Walk&, Rest&&... rest) {
    using cute::_;
    const auto operands = cute::make_tuple(cute::get<0>(tiles), cute::get<1>(tiles)(_, _, _, _, _0{}));
    const auto depth = cute::shape<3>(cute::get<0>(tiles));
    Conv::load(params, pipeline, state, operands, block, cute::make_coord_iterator(depth),
               static_cast<Rest&&>(rest)...);
  }
};

template <class T, class Tile>
struct Convolution {
  using Shape = typename Tile::Shape;
  using Cluster = typename Tile::Cluster;
  template <class Cooperative, class Pingpong>
  using Schedule = std::conditional_t<Tile::kCooperative, Cooperative, Pingpong>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, T, cutlass::layout::RowMajor, 8, T,
      cutlass::layout::RowMajor, 8,
      Schedule<cutlass::epilogue::TmaWarpSpecializedCooperative, cutlass::epilogue::TmaWarpSpecialized>,
      typename Fusion<T, Shape>::Type>::CollectiveOp;

  // The builder defines the parts of a cooperative main loop, but refuses to combine them.
  using Parts = cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, T,
      cutlass::layout::TensorNHWC, 8, T, cutlass::layout::TensorNHWC, 8, float, Shape, Cluster,
      cutlass::conv::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      Schedule<cutlass::conv::KernelImplicitTmaWarpSpecializedSm90Cooperative,
               cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>>;
  using Mainloop = cutlass::conv::collective::CollectiveConv<
      cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<
          cutlass::conv::Operator::kFprop, Parts::PipelineStages, 2, Cluster>,
      Shape, T, T, typename Parts::TiledMma,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
          typename Parts::GmemTiledCopyA, typename Parts::SmemLayoutA>,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
          typename Parts::GmemTiledCopyB, typename Parts::SmemLayoutB>>;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, cute::Shape<int, int, int>, int>,
      ConvAsGemm<Mainloop, Schedule<cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                    cutlass::gemm::KernelTmaWarpSpecializedPingpong>>,
      Epilogue, cutlass::gemm::PersistentScheduler>;
  static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  static typename Mainloop::ProblemShape problem(const ConvForward& a) {
    // A pointwise convolution reads no adjacent pixels: all pixels form one long row, so TMA boxes are contiguous.
    const bool pointwise = a.r * a.s == 1 && a.stride[0] * a.stride[1] == 1 && a.padding[0] + a.padding[1] == 0;
    const int n = pointwise ? 1 : a.n, h = pointwise ? 1 : a.h, w = pointwise ? int(output_pixels(a)) : a.w_;
    const auto pair = [](const int32_t(&p)[2]) { return cute::array<int, 2>{p[0], p[1]}; };
    using Packed = typename Mainloop::ProblemShape::TensorExtent;
    const Packed x = {n, h, w, a.c}, filters = {a.k, a.r, a.s, a.c};
    const auto strides = [](const Packed& p) { return Mainloop::ProblemShape::packed_stride_right_major(p); };
    return {cutlass::conv::Mode::kCrossCorrelation, x, strides(x), filters, strides(filters), pair(a.padding),
            pair(a.padding), pair(a.stride), pair(a.dilation), 1};
  }

  static typename Kernel::Arguments arguments(const ConvForward& a, int multiprocessors) {
    typename Kernel::Arguments to = {};
    to.problem_shape = {int(output_pixels(a)), a.k, {a.c, a.s, a.r}, 1};
    to.mainloop = {problem(a), {static_cast<const T*>(a.x), static_cast<const T*>(a.w)}};
    to.epilogue.thread = Fusion<T, Shape>::arguments(a);
    // A missing residual still needs an address.
    to.epilogue.ptr_C = static_cast<const T*>(a.residual != nullptr ? a.residual : a.y);
    to.epilogue.ptr_D = static_cast<T*>(a.y);
    to.epilogue.dC = to.epilogue.dD = {int64_t(a.k), _1{}, int64_t(0)};
    to.hw_info.sm_count = multiprocessors;
    return to;
  }
};

// All values that a launch depends on.
using Key = std::array<int64_t, 21>;

Key key_of(const ConvForward& a, int device) {
  const auto address = [](const void* p) { return int64_t(reinterpret_cast<uintptr_t>(p)); };
  return {
      address(a.x), address(a.w), address(a.residual), address(a.y), address(a.scale), address(a.shift),
      a.n, a.h, a.w_, a.c, a.k, a.r, a.s, a.stride[0], a.stride[1], a.padding[0], a.padding[1],
      a.dilation[0], a.dilation[1], a.relu, device};
}

struct HashKey {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t word : key) {
      hash = (hash ^ uint64_t(word)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

template <class Kernel>
cudaError_t launch(const typename Kernel::Params& params, cudaStream_t stream) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(typename Kernel::ClusterShape{}), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, cutlass::device_kernel<Kernel>, params);
}

// Caches the kernel parameters of each call, because making four TMA descriptors takes the host longer than the
// launch. A full cache is cleared.
template <class T, int TILE>
cudaError_t run_tile(const ConvForward& a, cudaStream_t stream) {
  using Tiled = Convolution<T, Tile<TILE>>;
  using Kernel = typename Tiled::Kernel;
  constexpr size_t kKnown = 256;
  thread_local std::unordered_map<Key, typename Kernel::Params, HashKey> known;

  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const Key key = key_of(a, device);
  auto found = known.find(key);
  if (found == known.end()) {
    cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(
        cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
    if (error != cudaSuccess) return error;
    const typename Kernel::Arguments arguments = Tiled::arguments(a, multiprocessors);
    const bool takes = Kernel::can_implement(arguments) && Kernel::get_workspace_size(arguments) == 0;
    if (!takes) return cudaErrorInvalidValue;
    if (known.size() == kKnown) known.clear();
    found = known.emplace(key, Kernel::to_underlying_arguments(arguments, nullptr)).first;
  }
  return launch<Kernel>(found->second, stream);
}

}  // namespace

template <Dtype DTYPE>
cudaError_t run(const ConvForward& a, int tile, cudaStream_t stream) {
  using T = std::conditional_t<DTYPE == Dtype::kHalf, cutlass::half_t, cutlass::bfloat16_t>;
  switch (tile) {
    case 0: return run_tile<T, 0>(a, stream);
    case 1: return run_tile<T, 1>(a, stream);
    case 2: return run_tile<T, 2>(a, stream);
    case 3: return run_tile<T, 3>(a, stream);
    case 4: return run_tile<T, 4>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace resnet_fast::cuda::sm90
