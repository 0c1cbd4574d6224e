// Reductions over pixels: batch statistics, and the sums of BatchNorm's gradient. A second launch merges partial
// results in a fixed order, so the result is deterministic.
#include "norm.h"
#include "pooling.h"
#include "walk.h"

namespace resnet_fast::cuda {
namespace {

constexpr int kBlocks = 8;   // per multiprocessor
constexpr int kPlaces = 16;  // minimum per thread: a block's partial results are 5% of the bytes it reads

// A merge kernel's block: 8 channels (32 bytes in fp32, a sector) × rows of threads that share the splits.
constexpr int kMergeChannels = 8, kMergeRows = kThreads / kMergeChannels;
constexpr int kInFlight = 8;  // splits that a thread loads at once

// Partial results are [splits][kRows][channels]; a thread has one lane per channel.
constexpr int kSums = 3, kMoments = 4;

template <class A, int LANES>
struct alignas(LANES * sizeof(A) % 16 ? sizeof(A) : 16) Lanes {
  A v[LANES];
};

template <int kRows, class P, class L, class A>
__device__ void put(const P& places, int which, int64_t channels, const L& from, A* partial) {
  if (threadIdx.y != 0) return;
  A* to = partial + (int64_t(blockIdx.y) * kRows + which) * channels + places.channel();
#pragma unroll
  for (int i = 0; i < int(sizeof(from.v) / sizeof(A)); ++i) {
    if (i < places.channels()) to[i] = from.v[i];
  }
}

// Adds one sum over the block's threads, and stores it as a partial result.
template <bool NHWC, class P, class A>
__device__ void put_sum(const P& places, int which, int64_t channels, const A (&sums)[kOctet], A* partial) {
  constexpr int kLanes = NHWC ? kOctet : 1;
  Lanes<A, kLanes> mine = {};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) mine.v[NHWC ? i : 0] += sums[i];
  mine = merge_down(mine, [](Lanes<A, kLanes> a, const Lanes<A, kLanes>& b) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  });
  put<kSums>(places, which, channels, mine, partial);
}

// Partial sums of g = dy under mask, of g·(z[0] − mean[0]) and, if z[1] is given, of g·(z[1] − mean[1]).
//
// Grid and places: walk.h. Bytes moved: dy and each z once, one mask bit per element, 3·splits·channels sums.
// Threads accumulate in registers; one block reduction at the end adds them.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) gradient_sums_kernel(
    const GradientSums<T> k, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  constexpr int kTogether = kAtOnce<T, 3>;
  Places<NHWC, WHOLE> places(k.shape);
  const Coefficients<A, NHWC> mean0(k.mean[0], places), mean1(k.mean[1], places);
  A sum[kOctet] = {}, sum_z0[kOctet] = {}, sum_z1[kOctet] = {};
  while (places.more()) {
    Spot spots[kTogether];
    Octet<T> dy[kTogether], z0[kTogether], z1[kTogether];
    uint32_t bits[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      spots[j] = places.next();
      if (spots[j].count == 0) continue;
      dy[j] = load<WHOLE>(k.dy, spots[j]);
      bits[j] = k.mask ? k.mask[spots[j].byte] : 0xffu;
      z0[j] = load<WHOLE>(k.z[0], spots[j]);
      if (k.z[1]) z1[j] = load<WHOLE>(k.z[1], spots[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (spots[j].count == 0) continue;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {  // elements that an octet lacks are zeros
        const A g = bits[j] >> i & 1 ? dy[j][i] : A(0);
        sum[i] += g;
        sum_z0[i] = fma(g, z0[j][i] - mean0[i], sum_z0[i]);
        if (k.z[1]) sum_z1[i] = fma(g, z1[j][i] - mean1[i], sum_z1[i]);
      }
    }
  }
  put_sum<NHWC>(places, 0, k.shape.channels, sum, partial);
  put_sum<NHWC>(places, 1, k.shape.channels, sum_z0, partial);
  if (k.z[1]) put_sum<NHWC>(places, 2, k.shape.channels, sum_z1, partial);
}

// out = g = dy + (residual under residual_mask), 0 where scale·x + shift ≤ 0; if mean[0] is given, also partial sums
// of g and of g·(x − mean[0]). It follows cuDNN's dgrad.
//
// Grid and places: walk.h. Bytes moved: dy, x, residual and out once each, one mask bit per element.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) finish_dgrad_kernel(
    const GradientSums<T> k, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  constexpr int kTogether = kAtOnce<T, 3>;
  Places<NHWC, WHOLE> places(k.shape);
  const Coefficients<A, NHWC> scale(k.scale, places), shift(k.shift, places), mean(k.mean[0], places);
  A sum[kOctet] = {}, sum_x[kOctet] = {};
  while (places.more()) {
    Spot spots[kTogether];
    Octet<T> dy[kTogether], x[kTogether], residual[kTogether];
    uint32_t bits[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      spots[j] = places.next();
      if (spots[j].count == 0) continue;
      dy[j] = load<WHOLE>(k.dy, spots[j]);
      if (k.residual) residual[j] = load<WHOLE>(k.residual, spots[j]);
      bits[j] = k.residual_mask ? k.residual_mask[spots[j].byte] : 0xffu;
      if (k.x) x[j] = load<WHOLE>(k.x, spots[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (spots[j].count == 0) continue;
      A g[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        g[i] = dy[j][i];
        if (k.residual) g[i] += bits[j] >> i & 1 ? residual[j][i] : A(0);
        if (k.scale && affine(x[j][i], scale[i], shift[i]) <= A(0)) g[i] = A(0);
        sum[i] += g[i];
        if (k.mean[0]) sum_x[i] = fma(g[i], x[j][i] - mean[i], sum_x[i]);
      }
      Octet<T> out;
      out.set(g);
      store<WHOLE>(k.out, spots[j], out);
    }
  }
  if (!partial) return;
  put_sum<NHWC>(places, 0, k.shape.channels, sum, partial);
  put_sum<NHWC>(places, 1, k.shape.channels, sum_x, partial);
}

// The gradient through a max-pool and ReLU: out = g = Σ of dy over the windows whose index names the pixel; if z[0]
// is given, also partial sums of g and of g·(z[0] − mean[0]).
//
// Grid and places: walk.h, over out. Each pixel reads the windows that contain it (up to four of 3×3 at stride 2), so
// there are no atomics, and out is written once and not cleared before. Bytes moved: out, z, dy and index once; the
// repeated reads of dy and index are by adjacent threads and hit L1 or L2.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) max_pool_bwd_kernel(
    const GradientSums<T> k, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  const Windows& w = k.windows;
  Places<NHWC, WHOLE> places(k.shape);
  const Coefficients<A, NHWC> mean(k.mean[0], places);
  A sum[kOctet] = {}, sum_z[kOctet] = {};
  // f(p, q, code of the pixel in window p, q) for every window that contains the pixel.
  const auto each = [&](const Pixel& at, auto f) {
    const Span rows = windows_of(w, 0, at.row), columns = windows_of(w, 1, at.column);
    for (int p = rows.begin; p < rows.end; ++p) {
      const int r = at.row + int(w.padding[0]) - p * int(w.stride[0]);
      for (int q = columns.begin; q < columns.end; ++q) {
        f(p, q, uint32_t(r * int(w.kernel[1]) + at.column + int(w.padding[1]) - q * int(w.stride[1])));
      }
    }
  };
  while (places.more()) {
    const Spot spot = places.next();
    Octet<T> z;
    if (k.z[0]) z = load<WHOLE>(k.z[0], spot);
    A g[kOctet] = {};
    if constexpr (NHWC) {
      const Pixel at = pixel_of(spot.element / w.channels, int(w.height), int(w.width));
      each(at, [&](int p, int q, uint32_t code) {
        const int64_t from = ((at.image * w.rows + p) * w.columns + q) * w.channels + places.channel();
        uint32_t codes[kOctet];
        load_codes<WHOLE>(k.index + from, codes, spot.count);
        const Octet<T> dy = load<WHOLE>(k.dy, {from, 0, spot.count});
#pragma unroll
        for (int i = 0; i < kOctet; ++i) g[i] += codes[i] == code ? dy[i] : A(0);
      });
    } else {
      const int64_t size = w.height * w.width, plane = spot.element / size;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i >= spot.count) continue;
        each(pixel_of(spot.element - plane * size + i, int(w.height), int(w.width)), [&](int p, int q, uint32_t code) {
          const int64_t from = (plane * w.rows + p) * w.columns + q;
          if (k.index[from] == code) g[i] += number<A>(k.dy[from]);
        });
      }
    }
    Octet<T> out;
    out.set(g);
    store<WHOLE>(k.out, spot, out);
    if (!k.z[0]) continue;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      sum[i] += g[i];
      sum_z[i] = fma(g[i], z[i] - mean[i], sum_z[i]);
    }
  }
  if (!partial) return;
  put_sum<NHWC>(places, 0, k.shape.channels, sum, partial);
  put_sum<NHWC>(places, 1, k.shape.channels, sum_z, partial);
}

// sums[0] = Σ partial[0], sums[j] = rstd[j − 1]·Σ partial[j].
template <class A>
struct MergeSums {
  const A* partial;
  int64_t splits, channels;
  const A* rstd[kSums - 1];
  A* sums[kSums];
};

// Grid: blocks of 8 channels × sums; the blocks of a missing sum return at once. A thread adds every 32nd split in
// order, in double, loading eight at once; one block reduction adds the rows.
//
// Estimate for 1,056 splits of 64 channels in fp32 on an H100, where a dependent load takes 0.2 µs: about 1.5 µs, in
// five rounds of loads. 8 rows that add three sums in sequence, one load at a time, would take 396 rounds: 80 µs.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) merge_sums_kernel(const MergeSums<A> k) {
  // Selected, not indexed: the compiler would copy indexed kernel arguments to local memory.
  const int which = blockIdx.y;
  A* const to = which == 0 ? k.sums[0] : which == 1 ? k.sums[1] : k.sums[2];
  const A* const rstd = which == 0 ? nullptr : which == 1 ? k.rstd[0] : k.rstd[1];
  if (!to) return;
  const int64_t c = int64_t(blockIdx.x) * kMergeChannels + threadIdx.x;
  const int64_t splits = c < k.channels ? k.splits : 0;
  double total = 0;
  for (int64_t first = threadIdx.y; first < splits; first += kInFlight * kMergeRows) {
    A sums[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t s = first + j * kMergeRows;
      sums[j] = s < splits ? k.partial[(s * kSums + which) * k.channels + c] : A(0);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) total += sums[j];
  }
  total = merge_down(total, [](double a, double b) { return a + b; });
  if (threadIdx.y != 0 || c >= k.channels) return;
  to[c] = A(rstd ? total * rstd[c] : total);
}

// A pivot for each of the thread's channels, which is subtracted from its values: the median of the first, the
// middle and the last pixel, so that a single outlier is not the pivot.
template <class T, bool NHWC, class P>
__device__ void pivots(const Statistics<T>& k, const P& places, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  const int64_t pixels = k.shape.rows * k.shape.inner / k.shape.channels;
  const auto at = [&](int64_t pixel, int64_t channel) {
    if (NHWC) return number<A>(k.x[pixel * k.shape.channels + channel]);
    const int64_t image = pixel / k.shape.inner;
    return number<A>(k.x[(image * k.shape.channels + channel) * k.shape.inner + pixel % k.shape.inner]);
  };
#pragma unroll
  for (int i = 0; i < (NHWC ? kOctet : 1); ++i) {
    to[i] = A(0);
    if (i >= places.channels()) continue;
    const int64_t c = places.channel() + i;
    const A first = at(0, c), middle = at(pixels / 2, c), last = at(pixels - 1, c);
    const A low = first < middle ? first : middle, high = first < middle ? middle : first;
    to[i] = last < low ? low : last > high ? high : last;
  }
}

// partial = count, mean, rounding error of the mean, and m2 of v = x − pivot, for each split and channel; the pivots
// follow the last split.
//
// Each lane runs Welford's recurrence over its values (n-th value v: δ = v − mean; mean += δ/n;
// m2 += δ·(v − mean)) and accumulates the rounding error of the mean. At the end one block reduction merges the
// lanes in double, weighted by their counts. Values are centred before they are squared, and means are rounded
// relative to the pivot, not to x: a channel of mean 1000 and deviation 1 keeps the digits of its variance.
// Welford 1962, Technometrics 4(3). Grid and places: walk.h. Bytes moved: x once, 4·splits·channels values.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) bn_stats_kernel(const Statistics<T> k, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  constexpr int kLanes = NHWC ? kOctet : 1;      // channels of a thread
  constexpr int kCounts = NHWC || WHOLE ? 1 : kOctet;  // lanes of the last octet of a plane may have fewer values
  constexpr int kTogether = kAtOnce<T, 1>;
  Places<NHWC, WHOLE> places(k.shape);
  A pivot[kLanes], mean[kOctet] = {}, rest[kOctet] = {}, m2[kOctet] = {}, count[kCounts] = {};
  pivots<T, NHWC>(k, places, pivot);
  while (places.more()) {
    Spot spots[kTogether];
    Octet<T> x[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      spots[j] = places.next();
      if (spots[j].count != 0) x[j] = load<WHOLE>(k.x, spots[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (spots[j].count == 0) continue;
      A share[kCounts];
#pragma unroll
      for (int i = 0; i < kCounts; ++i) {
        if (kCounts == 1 || i < spots[j].count) count[i] += A(1);
        share[i] = A(1) / max(count[i], A(1));
      }
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (!WHOLE && i >= spots[j].count) continue;
        const A v = x[j][i] - pivot[NHWC ? i : 0], delta = v - mean[i];
        const A step = delta * share[kCounts == 1 ? 0 : i], next = mean[i] + step;
        rest[i] += step - (next - mean[i]);
        mean[i] = next;
        m2[i] = fma(delta, v - next, m2[i]);
      }
    }
  }
  using Wide = Moments<double>;
  struct alignas(16) Parts {
    Wide v[kLanes];
  };
  Parts mine = {};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const Wide lane = {double(count[kCounts == 1 ? 0 : i]), double(mean[i]) + double(rest[i]), double(m2[i])};
    mine.v[NHWC ? i : 0] = NHWC ? lane : merge(mine.v[0], lane);
  }
  const Parts all = merge_down(mine, [](Parts a, const Parts& b) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) a.v[i] = merge(a.v[i], b.v[i]);
    return a;
  });
  Lanes<A, kLanes> out[kMoments];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    out[0].v[i] = A(all.v[i].count), out[1].v[i] = A(all.v[i].mean);
    out[2].v[i] = A(all.v[i].mean - double(out[1].v[i])), out[3].v[i] = A(all.v[i].m2);
  }
#pragma unroll
  for (int which = 0; which < kMoments; ++which) put<kMoments>(places, which, k.shape.channels, out[which], partial);
  if (blockIdx.y != 0 || threadIdx.y != 0) return;
  A* to = partial + kMoments * int64_t(gridDim.y) * k.shape.channels + places.channel();
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if (i < places.channels()) to[i] = pivot[i];
  }
}

// mean and m2 of each channel, merged over the splits (Chan et al. 1979).
template <class A>
struct MergeMoments {
  const A* partial;
  int64_t splits, channels;
  A *mean, *m2;
};

// count = Σ n[j], mean = Σ n[j]·mean[j] / count, m2 = Σ m2[j] + n[j]·(mean[j] − mean)², with one division.
template <int N>
__device__ Moments<double> merge_all(const Moments<double> (&parts)[N]) {
  Moments<double> all = {0, 0, 0};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    all.count += parts[j].count;
    all.mean = fma(parts[j].count, parts[j].mean, all.mean);
  }
  all.mean /= max(all.count, 1.0);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const double delta = parts[j].mean - all.mean;
    all.m2 += fma(parts[j].count * delta, delta, parts[j].m2);
  }
  return all;
}

// Grid: blocks of 8 channels. A thread merges every 32nd split in order, in double, loading eight at once; one block
// reduction merges the rows.
//
// Estimate, as for merge_sums_kernel: about 3.5 µs, in five rounds of loads with one division each. 8 rows that merge
// one split at a time would take 132 such rounds: 40 µs.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) merge_moments_kernel(const MergeMoments<A> k) {
  using Wide = Moments<double>;
  const int64_t c = int64_t(blockIdx.x) * kMergeChannels + threadIdx.x;
  const int64_t splits = c < k.channels ? k.splits : 0;
  Wide all = {0, 0, 0};
  for (int64_t first = threadIdx.y; first < splits; first += kInFlight * kMergeRows) {
    A moments[kInFlight][kMoments];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t s = first + j * kMergeRows;
      const A* from = k.partial + s * kMoments * k.channels + c;
#pragma unroll
      for (int i = 0; i < kMoments; ++i) moments[j][i] = s < splits ? from[i * k.channels] : A(0);
    }
    Wide parts[kInFlight + 1];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const A(&m)[kMoments] = moments[j];
      parts[j] = {double(m[0]), double(m[1]) + double(m[2]), double(m[3])};
    }
    parts[kInFlight] = all;
    all = merge_all(parts);
  }
  all = merge_down(all, [](Wide a, const Wide& b) { return merge(a, b); });
  if (threadIdx.y != 0 || c >= k.channels) return;
  k.mean[c] = A(double(k.partial[kMoments * k.splits * k.channels + c]) + all.mean);
  k.m2[c] = A(all.m2);
}

template <class K>
cudaError_t launch_merge(void (*kernel)(K), const K& k, int results, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(k.channels, kMergeChannels)), unsigned(results));
  return launch(kernel, grid, dim3(kMergeChannels, kMergeRows), stream, k);
}

}  // namespace

int64_t reduction_splits(const Shape& s, int multiprocessors) {
  return walk(s, kPlaces, int64_t(multiprocessors) * kBlocks).grid.y;
}

template <class T>
cudaError_t gradient_sums(
    const GradientSums<T>& k, int64_t splits, accumulate_t<T>* partial, accumulate_t<T>* const sums[3],
    cudaStream_t stream) {
  using A = accumulate_t<T>;
  Walk w = walk(k.shape, kPlaces, splits);
  w.grid.y = unsigned(splits);
  const auto* codes = reinterpret_cast<const T*>(k.index);  // for its alignment
  const std::initializer_list<const T*> operands = {k.out, k.dy, k.residual, k.x, k.z[0], k.z[1], codes};
  A* to = sums[0] ? partial : nullptr;
  const cudaError_t error = with_layout<T>(k.shape, operands, [&](auto nhwc, auto whole) {
    constexpr bool kNhwc = decltype(nhwc)::value, kWhole = decltype(whole)::value;
    const auto kernel = k.index ? max_pool_bwd_kernel<T, kNhwc, kWhole>
                        : k.out ? finish_dgrad_kernel<T, kNhwc, kWhole>
                                : gradient_sums_kernel<T, kNhwc, kWhole>;
    return launch(kernel, w.grid, w.block, stream, k, to);
  });
  if (error || !to) return error;
  const MergeSums<A> m = {
      partial, splits, k.shape.channels, {k.rstd[0], k.rstd[1]}, {sums[0], sums[1], sums[2]}};
  return launch_merge(merge_sums_kernel<A>, m, kSums, stream);
}

template <class T>
cudaError_t bn_stats(
    const Statistics<T>& k, int64_t splits, accumulate_t<T>* partial, accumulate_t<T>* mean, accumulate_t<T>* m2,
    cudaStream_t stream) {
  using A = accumulate_t<T>;
  Walk w = walk(k.shape, kPlaces, splits);
  w.grid.y = unsigned(splits);
  const cudaError_t error = with_layout<T>(k.shape, {k.x}, [&](auto nhwc, auto whole) {
    return launch(bn_stats_kernel<T, nhwc.value, whole.value>, w.grid, w.block, stream, k, partial);
  });
  if (error) return error;
  const MergeMoments<A> m = {partial, splits, k.shape.channels, mean, m2};
  return launch_merge(merge_moments_kernel<A>, m, 1, stream);
}

#define RESNET_FAST_REDUCTIONS(T)                                                                         \
  template cudaError_t gradient_sums(                                                                     \
      const GradientSums<T>&, int64_t, accumulate_t<T>*, accumulate_t<T>* const[3], cudaStream_t);        \
  template cudaError_t bn_stats(                                                                          \
      const Statistics<T>&, int64_t, accumulate_t<T>*, accumulate_t<T>*, accumulate_t<T>*, cudaStream_t);
RESNET_FAST_FOR_EACH_DTYPE(RESNET_FAST_REDUCTIONS)

}  // namespace resnet_fast::cuda
