// The transforms of winograd.h, sixteen channels at a time.

// The one-dimensional transforms, each of a column or a row. The names are those of winograd.h.
template <int kTile>
struct Transforms;

template <>
struct Transforms<2> {
  using V = Lanes<float>;
  static inline __attribute__((always_inline)) void b(const V (&d)[4], V (&to)[4]) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
  }
  static inline __attribute__((always_inline)) void g(const V (&tap)[3], V (&to)[4]) {
    const V half = V::broadcast(0.5f), outer = tap[0] + tap[2];
    to[0] = tap[0], to[1] = half * (outer + tap[1]), to[2] = half * (outer - tap[1]), to[3] = tap[2];
  }
  static inline __attribute__((always_inline)) void a(const V (&m)[4], V (&to)[2]) {
    to[0] = m[0] + (m[1] + m[2]), to[1] = (m[1] - m[2]) - m[3];
  }
  static inline __attribute__((always_inline)) void a_transposed(const V (&y)[2], V (&to)[4]) {
    to[0] = y[0], to[1] = y[0] + y[1], to[2] = y[0] - y[1], to[3] = V::broadcast(0) - y[1];
  }
  static inline __attribute__((always_inline)) void g_transposed(const V (&u)[4], V (&to)[3]) {
    const V half = V::broadcast(0.5f), sum = half * (u[1] + u[2]);
    to[0] = u[0] + sum, to[1] = half * (u[1] - u[2]), to[2] = sum + u[3];
  }
};

template <>
struct Transforms<4> {
  using V = Lanes<float>;
  static inline __attribute__((always_inline)) V by(float x, V v) { return V::broadcast(x) * v; }
  static inline __attribute__((always_inline)) V add(float x, V v, V to) { return fma(V::broadcast(x), v, to); }

  static inline __attribute__((always_inline)) void b(const V (&d)[6], V (&to)[6]) {
    const V even = add(-4, d[2], d[4]), odd = add(-4, d[1], d[3]), outer = d[4] - d[2], inner = d[3] - d[1];
    to[0] = add(4, d[0], add(-5, d[2], d[4]));
    to[1] = even + odd, to[2] = even - odd;
    to[3] = add(2, inner, outer), to[4] = add(-2, inner, outer);
    to[5] = add(4, d[1], add(-5, d[3], d[5]));
  }
  static inline __attribute__((always_inline)) void g(const V (&tap)[3], V (&to)[6]) {
    const V outer = by(-1 / 6.0f, tap[0] + tap[2]), far = add(1 / 24.0f, tap[0], by(1 / 6.0f, tap[2]));
    to[0] = by(1 / 4.0f, tap[0]);
    to[1] = add(-1 / 6.0f, tap[1], outer), to[2] = add(1 / 6.0f, tap[1], outer);
    to[3] = add(1 / 12.0f, tap[1], far), to[4] = add(-1 / 12.0f, tap[1], far);
    to[5] = tap[2];
  }
  static inline __attribute__((always_inline)) void a(const V (&m)[6], V (&to)[4]) {
    const V near = m[1] + m[2], far = m[3] + m[4], near_odd = m[1] - m[2], far_odd = m[3] - m[4];
    to[0] = (m[0] + near) + far, to[1] = add(2, far_odd, near_odd);
    to[2] = add(4, far, near), to[3] = add(8, far_odd, near_odd) + m[5];
  }
  static inline __attribute__((always_inline)) void a_transposed(const V (&y)[4], V (&to)[6]) {
    const V even = y[0] + y[2], odd = y[1] + y[3], far = add(4, y[2], y[0]), far_odd = add(8, y[3], by(2, y[1]));
    to[0] = y[0], to[1] = even + odd, to[2] = even - odd, to[3] = far + far_odd, to[4] = far - far_odd, to[5] = y[3];
  }
  static inline __attribute__((always_inline)) void g_transposed(const V (&u)[6], V (&to)[3]) {
    const V near = u[1] + u[2], far = u[3] + u[4], near_odd = u[2] - u[1], far_odd = u[3] - u[4];
    to[0] = add(1 / 4.0f, u[0], add(-1 / 6.0f, near, by(1 / 24.0f, far)));
    to[1] = add(1 / 6.0f, near_odd, by(1 / 12.0f, far_odd));
    to[2] = add(1 / 6.0f, far - near, u[5]);
  }
};

// to(i, j) = value (i, j) of f·m·fᵀ, where from(i, j) is value (i, j) of m and f(column) maps kIn values to kOut.
template <int kIn, int kOut, class F, class From, class To>
inline __attribute__((always_inline)) void both_ways(F f, From from, To to) {
  Lanes<float> columns[kIn][kOut];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; ++j) {
    Lanes<float> column[kIn];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) column[i] = from(i, j);
    f(column, columns[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i) {
    Lanes<float> row[kIn], out[kOut];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) row[j] = columns[j][i];
    f(row, out);
#pragma GCC unroll 6
    for (int j = 0; j < kOut; ++j) to(i, j, out[j]);
  }
}

template <int kTile>
void winograd_panel(const char* const* g, int64_t values, int64_t channels, float* u, int64_t pitch) {
  for (int64_t at = 0; at < channels * kColumns; at += 16) {
    const auto step = [&](const auto& value, float* to) {
      both_ways<3, kTile + 2>(
          Transforms<kTile>::g, [&](int i, int j) { return value(g[3 * i + j] + at / values * sizeof(float)); },
          [&](int i, int j, Lanes<float> v) { v.store(to + ((kTile + 2) * i + j) * pitch); });
    };
#if defined(RESNET_FAST_AVX512)
    if (values == 2) {
      // 16 columns of the pairs of two channels
      float* const to = u + at / (2 * kColumns) * (2 * kColumns) + at / 2 % kColumns;
      step([](const char* p) {
        return Lanes<float>{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
      }, to);
      step([](const char* p) {
        return Lanes<float>{_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)))};
      }, to + kColumns);
      at += 16;
      continue;
    }
#endif
    step([](const char* p) { return Lanes<float>::load(reinterpret_cast<const float*>(p)); }, u + at);
  }
}

template <class T, int kTile>
void winograd_input(const T* const* d, int64_t channels, float* v, int64_t pitch) {
  constexpr int n = kTile + 2;
  for (int64_t c = 0; c < channels; c += 16) {
    both_ways<n, n>(
        Transforms<kTile>::b, [&](int i, int j) { return Lanes<float>::load(d[n * i + j] + c); },
        [&](int i, int j, Lanes<float> value) { value.store(v + (n * i + j) * pitch + c); });
  }
}

template <class T, int kTile>
bool winograd_output(
    const float* m, int64_t pitch, int64_t channels, T* const* y, const T* const* residual, const float* scale,
    const float* shift, bool relu) {
  constexpr int n = kTile + 2;
  const auto zero = Lanes<float>::broadcast(0), one = Lanes<float>::broadcast(1);
  Lanes<float> check = zero;
  for (int64_t c = 0; c < channels; c += 16) {
    const auto factor = scale ? Lanes<float>::load(scale + c) : one;
    const auto added = shift ? Lanes<float>::load(shift + c) : zero;
    both_ways<n, kTile>(
        Transforms<kTile>::a, [&](int i, int j) { return Lanes<float>::load(m + (n * i + j) * pitch + c); },
        [&](int i, int j, Lanes<float> v) {
          const int at = kTile * i + j;
          if (y[at] == nullptr) return;
          if constexpr (kTile > 2) check = fma(v, zero, check);
          Lanes<float> out = fma(v, factor, added);
          if (residual[at]) out = out + Lanes<float>::load(residual[at] + c);
          if (relu) out = out.relu();
          out.store(y[at] + c);
        });
  }
  return kTile == 2 || check.sum() == 0;
}

template <class T, int kTile>
void winograd_output_gradient(const T* const* dy, int64_t channels, float* m, int64_t pitch) {
  constexpr int n = kTile + 2;
  for (int64_t c = 0; c < channels; c += 16) {
    both_ways<kTile, n>(
        Transforms<kTile>::a_transposed, [&](int i, int j) { return Lanes<float>::load(dy[kTile * i + j] + c); },
        [&](int i, int j, Lanes<float> v) { v.store(m + (n * i + j) * pitch + c); });
  }
}

template <int kTile>
bool winograd_filter_gradient(const float* u, int64_t pitch, int64_t channels, float* const* dw) {
  constexpr int n = kTile + 2;
  const auto zero = Lanes<float>::broadcast(0);
  Lanes<float> check = zero;
  for (int64_t c = 0; c < channels; c += 16) {
    both_ways<n, 3>(
        Transforms<kTile>::g_transposed, [&](int i, int j) { return Lanes<float>::load(u + (n * i + j) * pitch + c); },
        [&](int i, int j, Lanes<float> v) {
          if constexpr (kTile > 2) check = fma(v, zero, check);
          v.store(dw[3 * i + j] + c);
        });
  }
  return kTile == 2 || check.sum() == 0;
}

template <class T, int kTile>
const WinogradKernels<T>& winograd_kernels() {
  static const WinogradKernels<T> all = {winograd_panel<kTile>, winograd_input<T, kTile>, winograd_output<T, kTile>,
                                         winograd_output_gradient<T, kTile>, winograd_filter_gradient<kTile>};
  return all;
}

template const WinogradKernels<float>& winograd_kernels<float, 2>();
template const WinogradKernels<bf16>& winograd_kernels<bf16, 2>();
template const WinogradKernels<bf16>& winograd_kernels<bf16, 4>();
