// The kernels of conv_kernels.h, by vectors of AVX-512 or AVX2. A step of bf16 is a pair of values with AVX-512 BF16;
// elsewhere one value, which is widened to fp32 when it is copied or packed.

#if defined(RESNET_FAST_AVX512)
using Vector = __m512;
constexpr int kVector = 16, kTileRows = 14, kHalf = 7;

inline __attribute__((always_inline)) Vector load(const void* p) { return _mm512_loadu_ps(p); }
inline __attribute__((always_inline)) void store(void* p, Vector v) { _mm512_storeu_ps(p, v); }
inline __attribute__((always_inline)) Vector broadcast(const char* p) {
  return _mm512_set1_ps(*reinterpret_cast<const float*>(p));
}
inline __attribute__((always_inline)) Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline __attribute__((always_inline)) Vector multiply_add(Vector a, Vector b, Vector sum) {
#if defined(RESNET_FAST_AVX512_BF16)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return _mm512_fmadd_ps(a, b, sum);
#endif
}
// Lane i is p[i·ld].
inline Vector gather(const float* p, int64_t ld) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(ld))), p, 4);
}
// Sixteen values of a row of sums, from `part` on.
inline __attribute__((always_inline)) Lanes<float> lanes(const Vector (&row)[2], int part) { return {row[part]}; }
#else
using Vector = __m256;
constexpr int kVector = 8, kTileRows = 6, kHalf = 3;

inline __attribute__((always_inline)) Vector load(const void* p) {
  return _mm256_loadu_ps(static_cast<const float*>(p));
}
inline __attribute__((always_inline)) void store(void* p, Vector v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
inline __attribute__((always_inline)) Vector broadcast(const char* p) {
  return _mm256_broadcast_ss(reinterpret_cast<const float*>(p));
}
inline __attribute__((always_inline)) Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline __attribute__((always_inline)) Vector multiply_add(Vector a, Vector b, Vector sum) {
  return _mm256_fmadd_ps(a, b, sum);
}
inline Vector gather(const float* p, int64_t ld) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_i32gather_ps(p, _mm256_mullo_epi32(lanes, _mm256_set1_epi32(int(ld))), 4);
}
inline __attribute__((always_inline)) Lanes<float> lanes(const Vector (&row)[2], int) { return {row[0], row[1]}; }
#endif

constexpr int kColumns = 2 * kVector, kParts = kColumns / 16;
constexpr int64_t kPanelStep = kColumns * 4;
constexpr int kStepBytes = 4;  // between steps of A in unpacked pixels; kPanelStep in packed ones
#if defined(RESNET_FAST_AVX512_BF16)
constexpr int kValues = 2;  // per step
#else
constexpr int kValues = 1;
#endif

// Rows are in groups of four or three, at p, p + lda, p + 2·lda, p + 3·lda: x86 address modes with one pointer and
// two strides. Each half of the tile has two groups, or one with AVX2. kStep is product.a_step as a
// constant, which saves a register.
template <int kRows, int kStep>
inline __attribute__((always_inline)) void accumulate(
    const Product& product, Vector (&sum)[kRows][2]) {
  constexpr int kGroups = kRows > kHalf + 4 ? 4 : kRows > kHalf ? 3 : kRows > 4 ? 2 : 1;
  const int64_t lda = product.lda, lda3 = 3 * lda;
  const int64_t half_a = product.half_a, offset[4] = {0, 4 * lda, half_a, half_a + 4 * lda};
  const Stretch* stretches = product.stretches;
  for (int64_t i = 0; i < product.count; ++i) {
    const char* group[kGroups];
    for (int g = 0; g < kGroups; ++g) group[g] = product.a + stretches[i].a + offset[g];
    const char* b = product.b + stretches[i].b;
    for (int64_t step = stretches[i].steps; step > 0; --step) {
      const Vector b0 = load(b), b1 = load(b + kPanelStep / 2);
      b += kPanelStep;
#pragma GCC unroll 14
      for (int row = 0; row < kRows; ++row) {
        const int in_half = row % kHalf;
        const char* p = group[row / kHalf * 2 + in_half / 4];
        const char* at = in_half % 4 == 0 ? p : in_half % 4 == 1 ? p + lda : in_half % 4 == 2 ? p + 2 * lda : p + lda3;
        const Vector a = broadcast(at);
        sum[row][0] = multiply_add(a, b0, sum[row][0]);
        sum[row][1] = multiply_add(a, b1, sum[row][1]);
      }
      for (int g = 0; g < kGroups; ++g) group[g] += kStep;
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void store_lanes(Lanes<float> v, T* y) {
#if defined(RESNET_FAST_AVX512_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v.v));
#else
  v.store(y);
#endif
}

// Adds the previous value last, so that the rounding error grows with the chain, not with the whole sum.
template <int kRows, int kStep>
void add_rows(const Product& product, bool add_to, float* to, int64_t ld) {
  Vector sum[kRows][2];
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
    if (add_to) _mm_prefetch(reinterpret_cast<const char*>(to + row * ld), _MM_HINT_T0);
    if (add_to && kColumns > 16) _mm_prefetch(reinterpret_cast<const char*>(to + row * ld + 16), _MM_HINT_T0);
    sum[row][0] = sum[row][1] = Vector{};
  }
  accumulate<kRows, kStep>(product, sum);
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      float* at = to + row * ld + kVector * half;
      store(at, add_to ? add(load(at), sum[row][half]) : sum[row][half]);
    }
  }
}

// The epilogue of a tile with the sums sum(row, part).
template <int kRows, class T, class F>
inline __attribute__((always_inline)) void finish(
    F sum, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>& epilogue) {
  Lanes<float> scale[kParts], shift[kParts];  // added after the sum: a large shift in it would cost precision
  for (int part = 0; part < kParts; ++part) {
    scale[part] = epilogue.scale ? Lanes<float>::load(epilogue.scale + 16 * part) : Lanes<float>::broadcast(1);
    shift[part] = epilogue.shift ? Lanes<float>::load(epilogue.shift + 16 * part) : Lanes<float>::broadcast(0);
  }
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
    for (int part = 0; part < kParts; ++part) {
      Lanes<float> v = sum(row, part);
      if (epilogue.partial) v = v + Lanes<float>::load(epilogue.partial + row * kColumns + 16 * part);
      v = fma(v, scale[part], shift[part]);
      const int64_t at = row / kHalf * half_y + row % kHalf * ldy + 16 * part;
      if (epilogue.residual) v = v + Lanes<float>::load(epilogue.residual + at);
      if (epilogue.relu) v = v.relu();
      store_lanes(v, y + at);
    }
  }
}

template <int kRows, class T>
void store_rows(const Product& product, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>& epilogue) {
  if (epilogue.residual) {  // prefetched during the sum
    for (int row = 0; row < kRows; ++row) {
      const T* p = epilogue.residual + row / kHalf * half_y + row % kHalf * ldy;
      _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
      if (kColumns * sizeof(T) > 64) _mm_prefetch(reinterpret_cast<const char*>(p + 16), _MM_HINT_T0);
    }
  }
  const int64_t n = product.count, first = chain(product.stretches, n);
  if (first == n) {
    Vector sum[kRows][2];
#pragma GCC unroll 14
    for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = Vector{};
    accumulate<kRows, kStepBytes>(product, sum);
    finish<kRows>([&](int row, int part) { return lanes(sum[row], part); }, y, ldy, half_y, epilogue);
    return;
  }
  alignas(64) float sums[kRows][kColumns];
  Product part = product;
  for (int64_t i = 0; i < n; i += part.count) {
    part.stretches = product.stretches + i;
    part.count = chain(part.stretches, n - i);
    add_rows<kRows, kStepBytes>(part, i > 0, sums[0], kColumns);
  }
  finish<kRows>(
      [&](int row, int part) { return Lanes<float>::load(sums[row] + 16 * part); }, y, ldy, half_y, epilogue);
}

// f(std::integral_constant<int, rows>) for rows in 1..kTileRows.
template <int kRows = kTileRows, class F>
inline __attribute__((always_inline)) void with_rows(int rows, F f) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return f(std::integral_constant<int, kRows>());
    with_rows<kRows - 1>(rows, f);
  }
}

template <class T>
void store_tile(
    const Rows& rows, const Product& product, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>& epilogue, int&) {
  with_rows(rows.first + rows.second, [&](auto r) { store_rows<r.value>(product, y, ldy, half_y, epilogue); });
}

void sum_tile(const Rows& rows, const Product& product, bool add, float* partial) {
  with_rows(rows.first + rows.second, [&](auto r) {
    add_rows<r.value, kStepBytes>(product, add, partial, kColumns);
  });
}

void add_tile(int rows, const Product& product, bool add, float* to, int64_t ld, int&) {
  with_rows(rows, [&](auto r) { add_rows<r.value, kPanelStep>(product, add, to, ld); });
}

#if defined(RESNET_FAST_AVX512_BF16)
// Pairs of 16 values, `low` in the low halves.
inline Vector pairs(__m512 low, __m512 high) {
  const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low's 16 values, then high's
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
      16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, pair));
}
#endif

void pack_outer(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed) {
  for (int64_t i = 0; i < inner; i += kValues) {
    for (int half = 0; half < 2; ++half, packed += kPanelStep / 2) {
      const int64_t first = kVector * half * ld + i;
      if (is_float) {
        const float* p = static_cast<const float*>(w) + first;
#if defined(RESNET_FAST_AVX512_BF16)
        store(packed, pairs(gather(p, ld), gather(p + 1, ld)));
      } else {  // two adjacent values, at an even distance from other pairs
        store(packed, gather(reinterpret_cast<const float*>(static_cast<const bf16*>(w) + first), ld / 2));
#else
        store(packed, gather(p, ld));
#endif
      }
    }
  }
}

template <class W>
void pack_inner_of(const W* w, int64_t ld, int64_t outer, char* packed) {
  for (int64_t o = 0; o < outer; o += kValues, w += kValues * ld) {
    for (int part = 0; part < kParts; ++part, packed += 64) {
      const Lanes<float> low = Lanes<float>::load(w + 16 * part);
#if defined(RESNET_FAST_AVX512_BF16)
      store(packed, pairs(low.v, Lanes<float>::load(w + ld + 16 * part).v));
#else
      low.store(reinterpret_cast<float*>(packed));
#endif
    }
  }
}

void pack_inner(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed) {
  is_float ? pack_inner_of(static_cast<const float*>(w), ld, outer, packed)
           : pack_inner_of(static_cast<const bf16*>(w), ld, outer, packed);
}

template <class T>
void pack_pixels(const T* x, int64_t ld, int64_t pixels, int64_t channels, char* packed, int64_t panel_bytes) {
  for (int64_t i = 0; i < pixels; i += kValues, x += kValues * ld, packed += kPanelStep) {
    char* to = packed;
#if defined(RESNET_FAST_AVX512_BF16)
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
        32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const bool pair = i + 1 < pixels;
    for (int64_t c = 0; c < channels; c += kColumns, to += panel_bytes) {
      const __m512i low = _mm512_loadu_si512(x + c);
      const __m512i high = pair ? _mm512_loadu_si512(x + ld + c) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, first, high));
      _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(low, second, high));
    }
#else
    for (int64_t c = 0; c < channels; c += kColumns, to += panel_bytes) {
      for (int part = 0; part < kParts; ++part) {
        Lanes<float>::load(x + c + 16 * part).store(reinterpret_cast<float*>(to) + 16 * part);
      }
    }
#endif
  }
}

template <class T>
void widen_values(const T* x, int64_t values, float* to) {
  int64_t i = 0;
  for (; i + 16 <= values; i += 16) Lanes<float>::load(x + i).store(to + i);
  if (i < values) Lanes<float>::load(x + i, int(values - i)).store(to + i, int(values - i));
}

template <class T>
const ConvKernels<T>& conv_kernels() {
  static const ConvKernels<T> all = [] {
    ConvKernels<T> k = {};
    k.rows = kTileRows, k.half = kHalf, k.columns = kColumns, k.values = kValues;
    k.ragged = false, k.steps = 1, k.depth = kChain;
    k.scratch_bytes = 256 << 10, k.block_bytes = 32 << 10;
    // Parts of 11 rows of 32 use the FMAs of AVX-512 as well as 14; of 6 rows of 16 those of AVX2.
    k.dw_parts = 3, k.dw_pixels = 256, k.dw_bytes = 640 << 10;
    k.store_tile = store_tile<T>, k.sum_tile = sum_tile, k.add_tile = add_tile;
    k.pack_outer = pack_outer, k.pack_inner = pack_inner, k.pack_pixels = pack_pixels<T>;
    if (kValues * sizeof(T) < 4) k.widen = widen_values<T>;
    return k;
  }();
  return all;
}

#if !defined(RESNET_FAST_AVX512_BF16)
template const ConvKernels<float>& conv_kernels<float>();
#endif
template const ConvKernels<bf16>& conv_kernels<bf16>();
