// The formulas, shared by host and device. V is float, double or a vector of lanes that overloads + - * and
// fma. Notation as in resnet_fast/spec/reference.py (Ioffe & Szegedy 2015, arXiv:1502.03167).
#pragma once

#ifdef __CUDACC__
#define RESNET_FAST_INLINE __host__ __device__ __forceinline__
#else
#define RESNET_FAST_INLINE inline __attribute__((always_inline))
#endif

namespace resnet_fast {

// weight·xhat + bias = scale·z + shift
template <class V>
RESNET_FAST_INLINE V affine(V z, V scale, V shift) {
  return fma(z, scale, shift);
}

// dz = a·dy + b·(z − mean) + c: the gradient through batch statistics
template <class V>
RESNET_FAST_INLINE V batch_norm_gradient(V dy, V z, V mean, V a, V b, V c) {
  return fma(a, dy, fma(b, z - mean, c));
}

template <class A>
struct AffineCoefficients {
  A scale, shift, rstd;
};

// scale = weight·rstd, shift = bias − mean·scale, computed in W, wider than A: where |mean| is large, shift is a
// small difference of large numbers. It uses scale as rounded to A. `rsqrt` is the platform's 1/sqrt.
template <class A, class W, class Rsqrt>
RESNET_FAST_INLINE AffineCoefficients<A> finalize(A mean, W var, W weight, W bias, W eps, Rsqrt rsqrt) {
  const W rstd = rsqrt(var + eps);
  const A scale = A(weight * rstd);
  return {scale, A(bias - W(mean) * W(scale)), A(rstd)};
}

template <class A>
struct GradientCoefficients {
  A b, c;
};

// b = −scale·rstd·Σdy·xhat/M, c = −scale·Σdy/M
template <class A>
RESNET_FAST_INLINE GradientCoefficients<A> finalize_gradient(A sum_dy, A sum_dy_xhat, A scale, A rstd, A count) {
  const A a = scale / count;
  return {-a * rstd * sum_dy_xhat, -a * sum_dy};
}

// Count, mean and m2 = Σ(v − mean)² of a set of values; `merge` gives those of the union of two sets (Chan, Golub &
// LeVeque 1983). Means far from zero must be wider than the values, because `merge` subtracts them.
template <class A>
struct Moments {
  A count, mean, m2;
};

// x + step, a merged mean. If an infinite value makes `step` infinite or NaN, x + other, the sum of the two means.
template <class A>
RESNET_FAST_INLINE A moved(A x, A step, A other) {
  return step - step == A(0) ? x + step : x + other;
}

template <class A>
RESNET_FAST_INLINE Moments<A> merge(Moments<A> x, Moments<A> y) {
  const A count = x.count + y.count;
  if (count == A(0)) return x;
  const A delta = y.mean - x.mean, share = y.count / count;
  return {count, moved(x.mean, delta * share, y.mean), x.m2 + y.m2 + delta * delta * x.count * share};
}

}  // namespace resnet_fast
