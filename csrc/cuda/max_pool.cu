// BatchNorm, ReLU and max-pool in one pass; the backward pass is a reduction (reduce.cu).
#include "norm.h"
#include "pooling.h"
#include "walk.h"

namespace resnet_fast::cuda {
namespace {

constexpr int kBlocks = 16;  // per multiprocessor: several waves, so that the last one is short

// y = max over windows of relu(scale·z + shift); index = position of the first maximum in the window.
//
// Grid and places: walk.h, over y. Bytes moved: z and y once, one index byte per y. A value of z is in up to four
// windows (3×3, stride 2); these are adjacent, so the repeated reads hit L1 or L2. In NHWC with 16-bit dtypes a
// thread loads a whole 3×3 window at once. The maximum starts from 0, which is the ReLU; NaN wins.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) bn_relu_max_pool_kernel(const BnReluMaxPool<T> k) {
  using A = accumulate_t<T>;
  constexpr int kTogether = sizeof(T) == 2 ? 9 : 3;
  const Windows& w = k.windows;
  const int taps = int(w.kernel[1]), positions_count = int(w.kernel[0]) * taps;
  Places<NHWC, WHOLE> places(w.output());
  const Coefficients<A, NHWC> scale(k.scale, places), shift(k.shift, places);
  while (places.more()) {
    const Spot spot = places.next();
    A best[kOctet] = {};
    uint32_t code[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) code[i] = kNoPosition;
    const auto take = [&](int i, A v, int position) {
      if (k.scale) v = affine(v, scale[i], shift[i]);
      if (v > best[i] || v != v) best[i] = v, code[i] = uint32_t(position);
    };
    if constexpr (NHWC) {
      const Pixel at = pixel_of(spot.element / w.channels, int(w.rows), int(w.columns));
      const int top = at.row * int(w.stride[0]) - int(w.padding[0]);
      const int left = at.column * int(w.stride[1]) - int(w.padding[1]);
      const T* z = k.z + at.image * w.height * w.width * w.channels + places.channel();
      for (int first = 0; first < positions_count; first += kTogether) {
        Octet<T> values[kTogether];
        bool inside[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int h = top + (first + j) / taps, column = left + (first + j) % taps;
          inside[j] = first + j < positions_count && h >= 0 && h < w.height && column >= 0 && column < w.width;
          if (inside[j]) values[j] = load<WHOLE>(z, {(h * w.width + column) * w.channels, 0, spot.count});
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (!inside[j]) continue;
#pragma unroll
          for (int i = 0; i < kOctet; ++i) take(i, values[j][i], first + j);
        }
      }
    } else {
      const int64_t size = w.rows * w.columns, plane = spot.element / size;
      const T* z = k.z + plane * w.height * w.width;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i >= spot.count) continue;
        const Pixel at = pixel_of(spot.element - plane * size + i, int(w.rows), int(w.columns));
        const Span rows = positions(w, 0, at.row), columns = positions(w, 1, at.column);
        const int top = at.row * int(w.stride[0]) - int(w.padding[0]);
        const int left = at.column * int(w.stride[1]) - int(w.padding[1]);
        for (int r = rows.begin; r < rows.end; ++r) {
          for (int s = columns.begin; s < columns.end; ++s) {
            take(i, number<A>(z[int64_t(top + r) * w.width + left + s]), r * taps + s);
          }
        }
      }
    }
    Octet<T> out;
    out.set(best);
    store<WHOLE>(k.y, spot, out);
    if (k.index) store_codes<WHOLE>(k.index + spot.element, code, spot.count);
  }
}

}  // namespace

template <class T>
cudaError_t bn_relu_max_pool(const BnReluMaxPool<T>& k, cudaStream_t stream) {
  int processors;
  if (const cudaError_t error = multiprocessors(&processors)) return error;
  const Shape shape = k.windows.output();
  const Walk w = walk(shape, 1, int64_t(processors) * kBlocks);
  const auto* codes = reinterpret_cast<const T*>(k.index);  // for its alignment
  return with_layout<T>(shape, {k.y, k.z, codes}, [&](auto nhwc, auto whole) {
    return launch(bn_relu_max_pool_kernel<T, nhwc.value, whole.value>, w.grid, w.block, stream, k);
  });
}

#define RESNET_FAST_MAX_POOL(T) template cudaError_t bn_relu_max_pool(const BnReluMaxPool<T>&, cudaStream_t);
RESNET_FAST_FOR_EACH_DTYPE(RESNET_FAST_MAX_POOL)

}  // namespace resnet_fast::cuda
