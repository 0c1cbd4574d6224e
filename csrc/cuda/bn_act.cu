// The pointwise ops: each operand is read or written once.
#include "norm.h"
#include "walk.h"

namespace resnet_fast::cuda {
namespace {

constexpr int kBlocks = 16;  // per multiprocessor: several waves, so that the last one is short

// y = relu(scale·z + shift + (res_scale·residual + res_shift)); mask bit = 1 where ReLU passes the value.
//
// Grid and places: walk.h. Bytes moved: z, residual and y once each, one mask bit per element; coefficients stay
// in registers. NaN passes ReLU and its bit is set, because NaN must reach the gradient.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) bn_act_kernel(const BnAct<T> k) {
  using A = accumulate_t<T>;
  constexpr int kPlaces = kAtOnce<T, 2>;
  Places<NHWC, WHOLE> places(k.shape);
  const Coefficients<A, NHWC> scale(k.scale, places), shift(k.shift, places);
  const Coefficients<A, NHWC> res_scale(k.res_scale, places), res_shift(k.res_shift, places);
  while (places.more()) {
    Spot spots[kPlaces];
    Octet<T> z[kPlaces], residual[kPlaces];
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      spots[j] = places.next();
      if (spots[j].count == 0) continue;
      z[j] = load<WHOLE>(k.z, spots[j]);
      if (k.residual) residual[j] = load<WHOLE>(k.residual, spots[j]);
    }
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      if (spots[j].count == 0) continue;
      A y[kOctet];
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        A v = z[j][i];
        if (k.scale) v = affine(v, scale[i], shift[i]);
        if (k.residual) {
          const A r = residual[j][i];
          v += k.res_scale ? affine(r, res_scale[i], res_shift[i]) : r;
        }
        if (k.relu) {
          if (v <= A(0)) v = A(0);
          else bits |= 1u << i;
        }
        y[i] = v;
      }
      Octet<T> out;
      out.set(y);
      store<WHOLE>(k.y, spots[j], out);
      if (k.mask) k.mask[spots[j].byte] = uint8_t(bits & ((1u << spots[j].count) - 1));
    }
  }
}

// dz = a·(dy under mask) + b·(z − mean) + c + (residual under residual_mask).
//
// Grid and places: walk.h. Bytes moved: dy, z, residual and dz once each, one bit per element for each mask.
template <class T, bool NHWC, bool WHOLE>
__global__ void __launch_bounds__(kThreads, kResident<T>) bn_act_bwd_apply_kernel(const BnActBwdApply<T> k) {
  using A = accumulate_t<T>;
  constexpr int kPlaces = kAtOnce<T, 3>;
  Places<NHWC, WHOLE> places(k.shape);
  const Coefficients<A, NHWC> a(k.a, places), mean(k.mean, places), b(k.b, places), c(k.c, places);
  while (places.more()) {
    Spot spots[kPlaces];
    Octet<T> dy[kPlaces], z[kPlaces], residual[kPlaces];
    uint32_t bits[kPlaces], residual_bits[kPlaces];
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      spots[j] = places.next();
      if (spots[j].count == 0) continue;
      dy[j] = load<WHOLE>(k.dy, spots[j]);
      if (k.b) z[j] = load<WHOLE>(k.z, spots[j]);
      if (k.residual) residual[j] = load<WHOLE>(k.residual, spots[j]);
      bits[j] = k.mask ? k.mask[spots[j].byte] : 0xffu;
      residual_bits[j] = k.residual_mask ? k.residual_mask[spots[j].byte] : 0xffu;
    }
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      if (spots[j].count == 0) continue;
      A dz[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        A g = bits[j] >> i & 1 ? dy[j][i] : A(0);
        if (k.b) g = batch_norm_gradient(g, z[j][i], mean[i], a[i], b[i], c[i]);
        else if (k.a) g *= a[i];
        if (k.residual) g += residual_bits[j] >> i & 1 ? residual[j][i] : A(0);
        dz[i] = g;
      }
      Octet<T> out;
      out.set(dz);
      store<WHOLE>(k.dz, spots[j], out);
    }
  }
}

template <class K>
cudaError_t start(void (*kernel)(K), const K& k, int places, cudaStream_t stream) {
  int processors;
  if (const cudaError_t error = multiprocessors(&processors)) return error;
  const Walk w = walk(k.shape, places, int64_t(processors) * kBlocks);
  return launch(kernel, w.grid, w.block, stream, k);
}

}  // namespace

template <class T>
cudaError_t bn_act(const BnAct<T>& k, cudaStream_t stream) {
  return with_layout<T>(k.shape, {k.y, k.z, k.residual}, [&](auto nhwc, auto whole) {
    return start(bn_act_kernel<T, nhwc.value, whole.value>, k, kAtOnce<T, 2>, stream);
  });
}

template <class T>
cudaError_t bn_act_bwd_apply(const BnActBwdApply<T>& k, cudaStream_t stream) {
  return with_layout<T>(k.shape, {k.dz, k.dy, k.z, k.residual}, [&](auto nhwc, auto whole) {
    return start(bn_act_bwd_apply_kernel<T, nhwc.value, whole.value>, k, kAtOnce<T, 3>, stream);
  });
}

#define RESNET_FAST_POINTWISE(T)                                      \
  template cudaError_t bn_act(const BnAct<T>&, cudaStream_t);         \
  template cudaError_t bn_act_bwd_apply(const BnActBwdApply<T>&, cudaStream_t);
RESNET_FAST_FOR_EACH_DTYPE(RESNET_FAST_POINTWISE)

}  // namespace resnet_fast::cuda
