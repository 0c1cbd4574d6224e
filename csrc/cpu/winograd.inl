// The transforms of winograd.h, sixteen channels at a time.

// (a, b, c, d) → Bᵀ(a, b, c, d)
inline __attribute__((always_inline)) void winograd_rows(
    Lanes<float> a, Lanes<float> b, Lanes<float> c, Lanes<float> d, Lanes<float> (&to)[4]) {
  to[0] = a - c, to[1] = b + c, to[2] = c - b, to[3] = b - d;
}

// (a, b, c) → G(a, b, c)
inline __attribute__((always_inline)) void winograd_taps(
    Lanes<float> a, Lanes<float> b, Lanes<float> c, Lanes<float> (&to)[4]) {
  const auto half = Lanes<float>::broadcast(0.5f);
  const Lanes<float> outer = a + c;
  to[0] = a, to[1] = half * (outer + b), to[2] = half * (outer - b), to[3] = c;
}

void winograd_filter(const float* const g[9], int64_t channels, float* u, int64_t pitch) {
  for (int64_t c = 0; c < channels; c += 16) {
    Lanes<float> rows[3][4];  // of G g: [column][row]
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const auto at = [&](int i) { return Lanes<float>::load(g[3 * i + j] + c); };
      winograd_taps(at(0), at(1), at(2), rows[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Lanes<float> row[4];
      winograd_taps(rows[0][i], rows[1][i], rows[2][i], row);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) row[j].store(u + (4 * i + j) * pitch + c);
    }
  }
}

template <class T>
void winograd_input(const T* const d[16], int64_t channels, float* v, int64_t pitch) {
  for (int64_t c = 0; c < channels; c += 16) {
    Lanes<float> rows[4][4];  // of Bᵀ d: [column][row]
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto at = [&](int i) { return Lanes<float>::load(d[4 * i + j] + c); };
      winograd_rows(at(0), at(1), at(2), at(3), rows[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Lanes<float> row[4];
      winograd_rows(rows[0][i], rows[1][i], rows[2][i], rows[3][i], row);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) row[j].store(v + (4 * i + j) * pitch + c);
    }
  }
}

template <class T>
void winograd_output(
    const float* m, int64_t pitch, int64_t channels, T* const y[4], const T* const residual[4],
    const float* scale, const float* shift, bool relu) {
  const auto zero = Lanes<float>::broadcast(0), one = Lanes<float>::broadcast(1);
  for (int64_t c = 0; c < channels; c += 16) {
    Lanes<float> rows[2][4];  // of Aᵀ m: [row][column]
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto at = [&](int i) { return Lanes<float>::load(m + (4 * i + j) * pitch + c); };
      const Lanes<float> b = at(1), d = at(2);
      rows[0][j] = at(0) + (b + d), rows[1][j] = (b - d) - at(3);
    }
    const auto factor = scale ? Lanes<float>::load(scale + c) : one;
    const auto added = shift ? Lanes<float>::load(shift + c) : zero;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Lanes<float>(&row)[4] = rows[i];
      const Lanes<float> pair[2] = {row[0] + (row[1] + row[2]), (row[1] - row[2]) - row[3]};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (y[2 * i + j] == nullptr) continue;
        Lanes<float> out = fma(pair[j], factor, added);
        if (residual[2 * i + j]) out = out + Lanes<float>::load(residual[2 * i + j] + c);
        if (relu) out = out.relu();
        out.store(y[2 * i + j] + c);
      }
    }
  }
}

// (a, b) → A(a, b)
inline __attribute__((always_inline)) void winograd_pair(Lanes<float> a, Lanes<float> b, Lanes<float> (&to)[4]) {
  to[0] = a, to[1] = a + b, to[2] = a - b, to[3] = Lanes<float>::broadcast(0) - b;
}

template <class T>
void winograd_output_gradient(const T* const dy[4], int64_t channels, float* m, int64_t pitch) {
  for (int64_t c = 0; c < channels; c += 16) {
    Lanes<float> rows[2][4];  // of A dy: [column][row]
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      winograd_pair(Lanes<float>::load(dy[j] + c), Lanes<float>::load(dy[2 + j] + c), rows[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Lanes<float> row[4];
      winograd_pair(rows[0][i], rows[1][i], row);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) row[j].store(m + (4 * i + j) * pitch + c);
    }
  }
}

// (a, b, c, d) → Gᵀ(a, b, c, d)
inline __attribute__((always_inline)) void winograd_sums(
    Lanes<float> a, Lanes<float> b, Lanes<float> c, Lanes<float> d, Lanes<float> (&to)[3]) {
  const auto half = Lanes<float>::broadcast(0.5f);
  const Lanes<float> sum = half * (b + c);
  to[0] = a + sum, to[1] = half * (b - c), to[2] = sum + d;
}

void winograd_filter_gradient(const float* u, int64_t pitch, int64_t channels, float* const dw[9]) {
  for (int64_t c = 0; c < channels; c += 16) {
    Lanes<float> rows[4][3];  // of Gᵀ u: [column][row]
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto at = [&](int i) { return Lanes<float>::load(u + (4 * i + j) * pitch + c); };
      winograd_sums(at(0), at(1), at(2), at(3), rows[j]);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      Lanes<float> row[3];
      winograd_sums(rows[0][i], rows[1][i], rows[2][i], rows[3][i], row);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) row[j].store(dw[3 * i + j] + c);
    }
  }
}

template <class T>
const WinogradKernels<T>& winograd_kernels() {
  static const WinogradKernels<T> all = {winograd_filter, winograd_input<T>, winograd_output<T>,
                                         winograd_output_gradient<T>, winograd_filter_gradient};
  return all;
}

template const WinogradKernels<float>& winograd_kernels<float>();
template const WinogradKernels<bf16>& winograd_kernels<bf16>();
