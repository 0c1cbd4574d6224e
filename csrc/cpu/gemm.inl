// The kernels of conv_kernels.h, for Element = float (AVX-512) or bf16 (AVX-512 BF16).

constexpr int kTileRows = 14;
constexpr int kHalf = 7;
constexpr int kStepBytes = 4;  // between steps of A in unpacked pixels; kPanelStep in packed ones

inline __attribute__((always_inline)) __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
#if defined(RESNET_FAST_AVX512_BF16)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
#endif
}

// Rows are in groups of four or three, at p, p + lda, p + 2·lda, p + 3·lda: x86 address modes with one pointer and
// two strides. Each half of the tile has two groups. kStep is product.a_step as a constant, which saves a register.
template <int kRows, int kStep>
inline __attribute__((always_inline)) void accumulate(
    const Product& product, __m512 (&sum)[kRows][2]) {
  constexpr int kGroups = kRows > kHalf + 4 ? 4 : kRows > kHalf ? 3 : kRows > 4 ? 2 : 1;
  const int64_t lda = product.lda, lda3 = 3 * lda;
  const int64_t half_a = product.half_a, offset[4] = {0, 4 * lda, half_a, half_a + 4 * lda};
  const Stretch* stretches = product.stretches;
  for (int64_t i = 0; i < product.count; ++i) {
    const char* group[kGroups];
    for (int g = 0; g < kGroups; ++g) group[g] = product.a + stretches[i].a + offset[g];
    const char* b = product.b + stretches[i].b;
    for (int64_t step = stretches[i].steps; step > 0; --step) {
      const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
      b += kPanelStep;
#pragma GCC unroll 14
      for (int row = 0; row < kRows; ++row) {
        const int in_half = row % kHalf;
        const char* p = group[row / kHalf * 2 + in_half / 4];
        const char* at = in_half % 4 == 0 ? p : in_half % 4 == 1 ? p + lda : in_half % 4 == 2 ? p + 2 * lda : p + lda3;
        const __m512i a = _mm512_set1_epi32(*reinterpret_cast<const int*>(at));
        sum[row][0] = multiply_add(a, b0, sum[row][0]);
        sum[row][1] = multiply_add(a, b1, sum[row][1]);
      }
      for (int g = 0; g < kGroups; ++g) group[g] += kStep;
    }
  }
}

inline __attribute__((always_inline)) void store_lanes(Lanes<float> v, Element* y) {
#if defined(RESNET_FAST_AVX512_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v.v));
#else
  v.store(y);
#endif
}

// Adds the previous value last, so that the rounding error grows with the chain, not with the whole sum.
template <int kRows, int kStep>
void add_rows(const Product& product, bool add, float* to, int64_t ld) {
  __m512 sum[kRows][2];
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
    if (add) _mm_prefetch(reinterpret_cast<const char*>(to + row * ld), _MM_HINT_T0);
    if (add) _mm_prefetch(reinterpret_cast<const char*>(to + row * ld + 16), _MM_HINT_T0);
    sum[row][0] = sum[row][1] = _mm512_setzero_ps();
  }
  accumulate<kRows, kStep>(product, sum);
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      float* at = to + row * ld + 16 * half;
      _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sum[row][half]) : sum[row][half]);
    }
  }
}

// The number of `stretches` that one register accumulates: up to kChain steps, at least one stretch.
inline int64_t chain(const Stretch* stretches, int64_t n) {
  int64_t count = 0;
  for (int64_t sum = 0; count < n && (count == 0 || sum + stretches[count].steps <= kChain); ++count) {
    sum += stretches[count].steps;
  }
  return count;
}

// The epilogue of a tile with the accumulators sum(row, half).
template <int kRows, class F>
inline __attribute__((always_inline)) void finish(
    F sum, Element* y, int64_t ldy, int64_t half_y, const Epilogue<Element>& epilogue) {
  __m512 scale[2], shift[2];  // added after the sum: a large shift in it would cost precision
  for (int half = 0; half < 2; ++half) {
    scale[half] = epilogue.scale ? _mm512_loadu_ps(epilogue.scale + 16 * half) : _mm512_set1_ps(1);
    shift[half] = epilogue.shift ? _mm512_loadu_ps(epilogue.shift + 16 * half) : _mm512_setzero_ps();
  }
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      Lanes<float> v = {_mm512_fmadd_ps(sum(row, half), scale[half], shift[half])};
      const int64_t at = row / kHalf * half_y + row % kHalf * ldy + 16 * half;
      if (epilogue.residual) v = v + Lanes<float>::load(epilogue.residual + at);
      if (epilogue.relu) v = v.where(v.positive());
      store_lanes(v, y + at);
    }
  }
}

template <int kRows>
void store_rows(
    const Product& product, Element* y, int64_t ldy, int64_t half_y, const Epilogue<Element>& epilogue) {
  if (epilogue.residual) {  // prefetched during the sum
    for (int row = 0; row < kRows; ++row) {
      const Element* p = epilogue.residual + row / kHalf * half_y + row % kHalf * ldy;
      _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
      if (sizeof(Element) == 4) _mm_prefetch(reinterpret_cast<const char*>(p + 16), _MM_HINT_T0);
    }
  }
  const int64_t n = product.count, first = chain(product.stretches, n);
  if (first == n) {
    __m512 sum[kRows][2];
#pragma GCC unroll 14
    for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = _mm512_setzero_ps();
    accumulate<kRows, kStepBytes>(product, sum);
    finish<kRows>([&](int row, int half) { return sum[row][half]; }, y, ldy, half_y, epilogue);
    return;
  }
  alignas(64) float sums[kRows][kTileColumns];
  Product part = product;
  for (int64_t i = 0; i < n; i += part.count) {
    part.stretches = product.stretches + i;
    part.count = chain(part.stretches, n - i);
    add_rows<kRows, kStepBytes>(part, i > 0, sums[0], kTileColumns);
  }
  finish<kRows>([&](int row, int half) { return _mm512_load_ps(sums[row] + 16 * half); }, y, ldy, half_y, epilogue);
}

// f(std::integral_constant<int, rows>) for rows in 1..14.
template <int kRows = kTileRows, class F>
inline void with_rows(int rows, F f) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return f(std::integral_constant<int, kRows>());
    with_rows<kRows - 1>(rows, f);
  }
}

void store_tile(
    const Rows& rows, const Product& product, Element* y, int64_t ldy, int64_t half_y,
    const Epilogue<Element>& epilogue, int&) {
  with_rows(rows.first + rows.second, [&](auto r) { store_rows<r.value>(product, y, ldy, half_y, epilogue); });
}

void add_tile(int rows, const Product& product, bool add, float* to, int64_t ld, int&) {
  with_rows(rows, [&](auto r) { add_rows<r.value, kPanelStep>(product, add, to, ld); });
}

constexpr int kValues = 4 / sizeof(Element);  // values per step: 1 fp32, 2 bf16

// One step of lanes: fp32 unchanged; bf16 pairs with `low` in the low half.
inline __m512i step_of(__m512 low, __m512 high) {
#if defined(RESNET_FAST_AVX512_BF16)
  const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low's 16 values, then high's
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
      16, 0);
  return _mm512_permutexvar_epi16(order, pair);
#else
  (void)high;
  return _mm512_castps_si512(low);
#endif
}

void pack_outer(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(ld)));
  for (int64_t i = 0; i < inner; i += kValues) {
    for (int half = 0; half < 2; ++half, packed += 64) {
      __m512i step;
      if (is_float) {
        const float* p = static_cast<const float*>(w) + 16 * half * ld + i;
        const __m512 low = _mm512_i32gather_ps(index, p, 4);
        step = step_of(low, kValues == 2 ? _mm512_i32gather_ps(index, p + 1, 4) : low);
      } else {  // bf16: the pair is adjacent
        step = _mm512_i32gather_epi32(index, static_cast<const bf16*>(w) + 16 * half * ld + i, 2);
      }
      _mm512_storeu_si512(packed, step);
    }
  }
}

template <class W>
void pack_inner_of(const W* w, int64_t ld, int64_t outer, char* packed) {
  for (int64_t o = 0; o < outer; o += kValues) {
    for (int half = 0; half < 2; ++half, packed += 64) {
      const W* p = w + o * ld + 16 * half;
      const Lanes<float> low = Lanes<float>::load(p), high = Lanes<float>::load(p + (kValues == 2 ? ld : 0));
      _mm512_storeu_si512(packed, step_of(low.v, high.v));
    }
  }
}

void pack_inner(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed) {
  is_float ? pack_inner_of(static_cast<const float*>(w), ld, outer, packed)
           : pack_inner_of(static_cast<const Element*>(w), ld, outer, packed);
}

void pack_pixels(const Element* x, int64_t ld, int64_t pixels, int64_t channels, char* packed, int64_t panel_bytes) {
  for (int64_t i = 0; i < pixels; i += kValues, x += kValues * ld, packed += kPanelStep) {
    char* to = packed;
#if defined(RESNET_FAST_AVX512_BF16)
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
        32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const bool pair = i + 1 < pixels;
    for (int64_t c = 0; c < channels; c += 32, to += panel_bytes) {
      const __m512i low = _mm512_loadu_si512(x + c);
      const __m512i high = pair ? _mm512_loadu_si512(x + ld + c) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, first, high));
      _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(low, second, high));
    }
#else
    for (int64_t c = 0; c < channels; c += 32, to += panel_bytes) {
      _mm512_storeu_ps(to, _mm512_loadu_ps(x + c));
      _mm512_storeu_ps(to + 64, _mm512_loadu_ps(x + c + 16));
    }
#endif
  }
}

const ConvKernels<Element>& conv_kernels() {
  static const ConvKernels<Element> all = [] {
    ConvKernels<Element> k = {};
    k.rows = kTileRows, k.half = kHalf, k.ragged = false, k.steps = 1, k.depth = kChain;
    k.scratch_bytes = 256 << 10, k.block_bytes = 32 << 10;
    k.dw_parts = 3;  // 11 rows use the FMAs as well as 14, and 3·11 is little more than 32
    k.dw_pixels = 256, k.dw_bytes = 640 << 10;
    k.store_tile = store_tile, k.add_tile = add_tile;
    k.pack_outer = pack_outer, k.pack_inner = pack_inner, k.pack_pixels = pack_pixels;
    return k;
  }();
  return all;
}
