// The memory-bound kernels of kernels.h, written with Lanes. Included once per instruction set.

// The coefficient of element i of a row: from a vector along the row (NHWC), or one value for the row (NCHW).
template <class A>
struct Coefficient {
  const A* p;
  bool along;
  Lanes<A> at(int64_t i, int n) const { return along ? Lanes<A>::load(p + i, n) : Lanes<A>::broadcast(*p); }
  explicit operator bool() const { return p != nullptr; }
};

template <class A>
Coefficient<A> coefficient(const Shape& s, const A* p, int64_t row) {
  return {p == nullptr || s.nhwc ? p : p + row % s.channels, s.nhwc};
}

inline int64_t mask_width(const Shape& s) { return (s.inner + 7) / 8; }

inline uint32_t load_bits(const uint8_t* mask, int64_t i, int n) {
  const uint32_t low = mask[i / 8];
  return n > 8 ? low | uint32_t(mask[i / 8 + 1]) << 8 : low;
}

inline void store_bits(uint8_t* mask, int64_t i, int n, uint32_t bits) {
  if (n < 16) bits &= (1u << n) - 1;
  mask[i / 8] = uint8_t(bits);
  if (n > 8) mask[i / 8 + 1] = uint8_t(bits >> 8);
}

template <class F>
inline __attribute__((always_inline)) void for_lanes(int64_t inner, F body) {
  int64_t i = 0;
  for (; i + 16 <= inner; i += 16) body(i, 16);
  if (i < inner) body(i, int(inner - i));
}

template <class T, bool kResidual, bool kMask>
void bn_act_rows(const BnAct<T>& k, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  const Shape& s = k.shape;
  for (int64_t row = begin; row < end; ++row) {
    const auto scale = coefficient(s, k.scale, row), shift = coefficient(s, k.shift, row);
    const auto res_scale = coefficient(s, k.res_scale, row), res_shift = coefficient(s, k.res_shift, row);
    const T *z = k.z + row * s.inner, *residual = kResidual ? k.residual + row * s.inner : nullptr;
    T* y = k.y + row * s.inner;
    uint8_t* mask = kMask ? k.mask + row * mask_width(s) : nullptr;
    for_lanes(s.inner, [&](int64_t i, int n) {
      V v = V::load(z + i, n);
      if (scale) v = affine(v, scale.at(i, n), shift.at(i, n));
      if constexpr (kResidual) {
        V r = V::load(residual + i, n);
        v = v + (res_scale ? affine(r, res_scale.at(i, n), res_shift.at(i, n)) : r);
      }
      const uint32_t bits = k.relu ? v.positive() : 0xffff;
      if constexpr (kMask) store_bits(mask, i, n, bits);
      v.where(bits).store(y + i, n);
    });
  }
}

template <class T>
void bn_act(const BnAct<T>& k, int64_t begin, int64_t end) {
  if (k.residual != nullptr) {
    k.mask != nullptr ? bn_act_rows<T, true, true>(k, begin, end) : bn_act_rows<T, true, false>(k, begin, end);
  } else {
    k.mask != nullptr ? bn_act_rows<T, false, true>(k, begin, end) : bn_act_rows<T, false, false>(k, begin, end);
  }
}

template <bool kIndex, class T>
void bn_relu_max_pool_nhwc(const BnReluMaxPool<T>& k, int64_t row) {
  using V = Lanes<accumulate_t<T>>;
  const Windows& w = k.windows;
  const int64_t image = row / (w.rows * w.columns);
  const int q = int(row % w.columns), p = int(row / w.columns % w.rows);
  const Span rows = positions(w, 0, p), columns = positions(w, 1, q);
  const int64_t top = image * w.height + p * w.stride[0] - w.padding[0], left = q * w.stride[1] - w.padding[1];
  for_lanes(w.channels, [&](int64_t i, int n) {
    V best = V::broadcast(0), code = V::broadcast(kNoPosition), scale = best, shift = best;
    if (k.scale != nullptr) scale = V::load(k.scale + i, n), shift = V::load(k.shift + i, n);
    for (int r = rows.begin; r < rows.end; ++r) {
      const T* z = k.z + ((top + r) * w.width + left) * w.channels + i;
      for (int s = columns.begin; s < columns.end; ++s) {
        V v = V::load(z + s * w.channels, n);
        if (k.scale != nullptr) v = affine(v, scale, shift);
        const uint32_t bits = v.above(best);
        best = v.where(bits, best);
        if constexpr (kIndex) code = V::broadcast(r * int(w.kernel[1]) + s).where(bits, code);
      }
    }
    best.store(k.y + row * w.channels + i, n);
    if constexpr (kIndex) {
      accumulate_t<T> codes[V::kWidth];
      code.store(codes);
      for (int j = 0; j < n; ++j) k.index[row * w.channels + i + j] = uint8_t(int(codes[j]));
    }
  });
}

template <class T>
void bn_relu_max_pool_nchw(const BnReluMaxPool<T>& k, int64_t row) {
  using A = accumulate_t<T>;
  const Windows& w = k.windows;
  const int64_t channel = row % w.channels, size = w.rows * w.columns;
  const T* z = k.z + row * w.height * w.width;
  for (int64_t i = 0; i < size; ++i) {
    const int p = int(i / w.columns), q = int(i % w.columns);
    const Span rows = positions(w, 0, p), columns = positions(w, 1, q);
    A best = 0;
    int code = kNoPosition;
    for (int r = rows.begin; r < rows.end; ++r) {
      for (int s = columns.begin; s < columns.end; ++s) {
        const int64_t h = p * w.stride[0] - w.padding[0] + r, column = q * w.stride[1] - w.padding[1] + s;
        A v = widen<A>(z[h * w.width + column]);
        if (k.scale != nullptr) v = affine(v, k.scale[channel], k.shift[channel]);
        if (v > best || v != v) best = v, code = r * int(w.kernel[1]) + s;
      }
    }
    k.y[row * size + i] = narrow<T>(best);
    if (k.index != nullptr) k.index[row * size + i] = uint8_t(code);
  }
}

template <class T>
void bn_relu_max_pool(const BnReluMaxPool<T>& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!k.windows.nhwc) {
      bn_relu_max_pool_nchw(k, row);
    } else if (k.index != nullptr) {
      bn_relu_max_pool_nhwc<true>(k, row);
    } else {
      bn_relu_max_pool_nhwc<false>(k, row);
    }
  }
}

// Lanes of p at i, zero where the bit of `mask` is 0; all lanes without a mask.
template <class V, class T>
inline __attribute__((always_inline)) V load_masked(const T* p, const uint8_t* mask, int64_t i, int n) {
  const V v = V::load(p + i, n);
  return mask == nullptr ? v : v.where(load_bits(mask, i, n));
}

inline const uint8_t* mask_row(const uint8_t* mask, const Shape& s, int64_t row) {
  return mask == nullptr ? nullptr : mask + row * mask_width(s);
}

template <class T>
void bn_act_bwd_apply(const BnActBwdApply<T>& k, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  const Shape& s = k.shape;
  for (int64_t row = begin; row < end; ++row) {
    const auto a = coefficient(s, k.a, row), b = coefficient(s, k.b, row), c = coefficient(s, k.c, row);
    const auto mean = coefficient(s, k.mean, row);
    const T *dy = k.dy + row * s.inner, *z = k.z + row * s.inner, *residual = k.residual + row * s.inner;
    const uint8_t *mask = mask_row(k.mask, s, row), *residual_mask = mask_row(k.residual_mask, s, row);
    T* dz = k.dz + row * s.inner;
    for_lanes(s.inner, [&](int64_t i, int n) {
      V g = load_masked<V>(dy, mask, i, n);
      if (b) {
        g = batch_norm_gradient(g, V::load(z + i, n), mean.at(i, n), a.at(i, n), b.at(i, n), c.at(i, n));
      } else if (a) {
        g = c ? fma(g, a.at(i, n), c.at(i, n)) : g * a.at(i, n);
      }
      if (k.residual != nullptr) g = g + load_masked<V>(residual, residual_mask, i, n);
      g.store(dz + i, n);
    });
  }
}

// Bit i: p[i] == code.
inline uint32_t equal_bytes(const uint8_t* p, int code, int n) {
  uint32_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint32_t(p[i] == code) << i;
  return bits;
}

// The gradient through a max-pool, at row `row` of its input.
template <class T>
class PooledRow {
 public:
  using V = Lanes<accumulate_t<T>>;

  PooledRow(const GradientSums<T>& k, int64_t row) : k_(k), w_(k.windows), row_(row), out_(k.out + row * k.shape.inner) {
    if (w_.nhwc) place(row % (w_.height * w_.width));
  }

  V at(int64_t i, int n) {
    accumulate_t<T> lanes[V::kWidth] = {};
    V g = V::broadcast(0);
    if (w_.nhwc) {
      const int64_t image = row_ / (w_.height * w_.width);
      each([&](int p, int q, int code) {
        const int64_t from = ((image * w_.rows + p) * w_.columns + q) * w_.channels + i;
        g = g + V::load(k_.dy + from, n).where(equal_bytes(k_.index + from, code, n));
      });
    } else {
      for (int j = 0; j < n; ++j) {
        place(i + j);
        each([&](int p, int q, int code) {
          const int64_t from = (row_ * w_.rows + p) * w_.columns + q;
          if (k_.index[from] == code) lanes[j] += widen<accumulate_t<T>>(k_.dy[from]);
        });
      }
      g = V::load(lanes);
    }
    g.store(out_ + i, n);
    return g;
  }

 private:
  void place(int64_t pixel) {
    h_ = int(pixel / w_.width), column_ = int(pixel % w_.width);
    rows_ = windows_of(w_, 0, h_), columns_ = windows_of(w_, 1, column_);
  }

  // f(p, q, code of the pixel in window p, q) for every window that contains the pixel.
  template <class F>
  void each(F f) const {
    for (int p = rows_.begin; p < rows_.end; ++p) {
      const int64_t r = h_ + w_.padding[0] - p * w_.stride[0];
      for (int q = columns_.begin; q < columns_.end; ++q) {
        f(p, q, int(r * w_.kernel[1] + column_ + w_.padding[1] - q * w_.stride[1]));
      }
    }
  }

  const GradientSums<T>& k_;
  const Windows& w_;
  int64_t row_;
  int h_ = 0, column_ = 0;
  T* out_;
  Span rows_, columns_;
};

// One row of the operands of GradientSums. kPlain: only dy under a mask, as after a block's addition.
template <class T, bool kPlain>
struct GradientRow {
  using V = Lanes<accumulate_t<T>>;
  T* out;
  const T *dy, *residual, *x;
  const uint8_t *mask, *residual_mask;
  Coefficient<accumulate_t<T>> scale, shift;

  GradientRow(const GradientSums<T>& k, int64_t row)
      : out(k.out + row * k.shape.inner), dy(k.dy + row * k.shape.inner),
        residual(k.residual == nullptr ? nullptr : k.residual + row * k.shape.inner), x(k.x + row * k.shape.inner),
        mask(mask_row(k.mask, k.shape, row)), residual_mask(mask_row(k.residual_mask, k.shape, row)),
        scale(coefficient(k.shape, k.scale, row)), shift(coefficient(k.shape, k.shift, row)) {
    if (k.out == nullptr) out = nullptr;
  }

  inline __attribute__((always_inline)) V at(int64_t i, int n) const {
    V g = load_masked<V>(dy, mask, i, n);
    if constexpr (!kPlain) {
      if (residual != nullptr) g = g + load_masked<V>(residual, residual_mask, i, n);
      if (scale) g = g.where(affine(V::load(x + i, n), scale.at(i, n), shift.at(i, n)).positive());
      if (out != nullptr) g.store(out + i, n);
    }
    return g;
  }
};

// Σg·xhat = rstd·Σg·(z − mean): the sum of the rows is multiplied by rstd once.
template <int kRows, int kSources, class Row, class T>
void gradient_sums_nhwc(const GradientSums<T>& k, int64_t row, accumulate_t<T>* sums) {
  using V = Lanes<accumulate_t<T>>;
  const int64_t inner = k.shape.inner;
  Row rows[4] = {
      {k, row}, {k, row + (kRows > 1)}, {k, row + 2 * (kRows > 1)}, {k, row + 3 * (kRows > 1)}};
  const T *z0 = k.z[0] + row * inner, *z1 = k.z[1] + row * inner;
  for_lanes(inner, [&](int64_t i, int n) {
    V total = V::broadcast(0), dot0 = total, dot1 = total, mean0 = total, mean1 = total;
    if constexpr (kSources > 0) mean0 = V::load(k.mean[0] + i, n);
    if constexpr (kSources > 1) mean1 = V::load(k.mean[1] + i, n);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V g = rows[r].at(i, n);
      total = total + g;
      if constexpr (kSources > 0) dot0 = fma(g, V::load(z0 + r * inner + i, n) - mean0, dot0);
      if constexpr (kSources > 1) dot1 = fma(g, V::load(z1 + r * inner + i, n) - mean1, dot1);
    }
    (V::load(sums + i, n) + total).store(sums + i, n);
    accumulate_t<T>* to = sums + inner + i;
    if constexpr (kSources > 0) fma(dot0, V::load(k.rstd[0] + i, n), V::load(to, n)).store(to, n);
    to += inner;
    if constexpr (kSources > 1) fma(dot1, V::load(k.rstd[1] + i, n), V::load(to, n)).store(to, n);
  });
}

template <int kSources, class Row, class T>
void gradient_sums_nchw(const GradientSums<T>& k, int64_t row, double* sums) {
  using V = Lanes<accumulate_t<T>>;
  const int64_t inner = k.shape.inner, channel = row % k.shape.channels;
  Row gradient(k, row);
  V total = V::broadcast(0), dot[2] = {V::broadcast(0), V::broadcast(0)};
  for_lanes(inner, [&](int64_t i, int n) {
    const V g = gradient.at(i, n);
    total = total + g;
    for (int j = 0; j < kSources; ++j) {
      dot[j] = fma(g, V::load(k.z[j] + row * inner + i, n) - V::broadcast(k.mean[j][channel]), dot[j]);
    }
  });
  sums[0] += total.sum();
  for (int j = 0; j < kSources; ++j) sums[j + 1] += double(dot[j].sum()) * k.rstd[j][channel];
}

template <int kSources, class Row, class T>
void gradient_sums_by(const GradientSums<T>& k, int64_t begin, int64_t end, int64_t step, accumulate_t<T>* sums) {
  if (k.shape.nhwc) {
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) gradient_sums_nhwc<4, kSources, Row>(k, row, sums);
    for (; row < end; ++row) gradient_sums_nhwc<1, kSources, Row>(k, row, sums);
  } else {
    double total[3] = {0, 0, 0};
    for (int64_t row = begin; row < end; row += step) gradient_sums_nchw<kSources, Row>(k, row, total);
    for (int j = 0; j <= kSources; ++j) sums[j] += accumulate_t<T>(total[j]);
  }
}

template <int kSources, class T>
void gradient_sums_of(const GradientSums<T>& k, int64_t begin, int64_t end, int64_t step, accumulate_t<T>* sums) {
  if (k.index != nullptr) {
    gradient_sums_by<kSources, PooledRow<T>>(k, begin, end, step, sums);
  } else if (k.residual == nullptr && k.scale == nullptr && k.out == nullptr) {
    gradient_sums_by<kSources, GradientRow<T, true>>(k, begin, end, step, sums);
  } else {
    gradient_sums_by<kSources, GradientRow<T, false>>(k, begin, end, step, sums);
  }
}

template <class T>
void gradient_sums(const GradientSums<T>& k, int64_t begin, int64_t end, int64_t step, accumulate_t<T>* sums) {
  if (k.z[1] != nullptr) {
    gradient_sums_of<2>(k, begin, end, step, sums);
  } else if (k.z[0] != nullptr) {
    gradient_sums_of<1>(k, begin, end, step, sums);
  } else {
    gradient_sums_of<0>(k, begin, end, step, sums);
  }
}

// Two passes over rows that are in cache: first the mean, then Σ(x − mean) and Σ(x − mean)². Σ(x − mean) measures
// the rounding error of the mean, and corrects mean and m2.
template <class T>
void statistics_nhwc(
    const Statistics<T>& k, int64_t begin, int64_t end, wider_t<accumulate_t<T>>* moments) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  using W = wider_t<A>;
  const int64_t inner = k.shape.inner;
  thread_local std::vector<A> buffer;
  buffer.assign(3 * inner, A(0));
  A *mean = buffer.data(), *rest = mean + inner, *m2 = rest + inner;
  const V share = V::broadcast(A(1) / A(end - begin));
  const auto for_rows = [&](auto add) {
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) add(k.x + row * inner, std::integral_constant<int, 4>());
    for (; row < end; ++row) add(k.x + row * inner, std::integral_constant<int, 1>());
  };
  for_rows([&](const T* x, auto rows) {
    for_lanes(inner, [&](int64_t i, int n) {
      V sum = V::broadcast(0);
      for (int r = 0; r < rows.value; ++r) sum = sum + V::load(x + r * inner + i, n);
      fma(sum, share, V::load(mean + i, n)).store(mean + i, n);
    });
  });
  for_rows([&](const T* x, auto rows) {
    for_lanes(inner, [&](int64_t i, int n) {
      const V center = V::load(mean + i, n);
      V sum = V::broadcast(0), squares = sum;
      for (int r = 0; r < rows.value; ++r) {
        const V d = V::load(x + r * inner + i, n) - center;
        sum = sum + d;
        squares = fma(d, d, squares);
      }
      (V::load(rest + i, n) + sum).store(rest + i, n);
      (V::load(m2 + i, n) + squares).store(m2 + i, n);
    });
  });
  for (int64_t i = 0; i < inner; ++i) {
    const W left = W(rest[i]) / W(end - begin), squares = W(m2[i]) - left * W(rest[i]);
    moments[i] = moved(W(mean[i]), left, W(0));
    moments[inner + i] = squares < 0 ? 0 : squares;
  }
}

// The planes of one channel in pieces: each piece is centred by its mean, then the pieces are merged.
template <class T>
void statistics_nchw(
    const Statistics<T>& k, int64_t begin, int64_t end, int64_t step, wider_t<accumulate_t<T>>* moments) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  using W = wider_t<A>;
  Moments<W> all = {0, 0, 0};
  for (int64_t row = begin; row < end; row += step) {
    for (int64_t at = 0; at < k.shape.inner; at += kStatisticsRows) {
      const T* x = k.x + row * k.shape.inner + at;
      const int64_t size = std::min(kStatisticsRows, k.shape.inner - at);
      V sum = V::broadcast(0), rest = sum, squares = sum;
      for_lanes(size, [&](int64_t i, int n) { sum = sum + V::load(x + i, n); });
      const A mean = sum.sum() / A(size);
      for_lanes(size, [&](int64_t i, int n) {
        V d = V::load(x + i, n) - V::broadcast(mean);
        if (n < 16) d = d.where((1u << n) - 1);
        rest = rest + d;
        squares = fma(d, d, squares);
      });
      const W left = W(rest.sum()) / W(size), m2 = W(squares.sum()) - left * left * W(size);
      all = merge(all, {W(size), moved(W(mean), left, W(0)), m2 < 0 ? W(0) : m2});
    }
  }
  moments[0] = all.mean;
  moments[1] = all.m2;
}

template <class T>
void statistics(
    const Statistics<T>& k, int64_t begin, int64_t end, int64_t step, wider_t<accumulate_t<T>>* moments) {
  k.shape.nhwc ? statistics_nhwc(k, begin, end, moments) : statistics_nchw(k, begin, end, step, moments);
}

template <class T>
const Kernels<T>& kernels() {
  static constexpr Kernels<T> all = {bn_act<T>, bn_relu_max_pool<T>, bn_act_bwd_apply<T>, gradient_sums<T>, statistics<T>};
  return all;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<bf16>& kernels<bf16>();
