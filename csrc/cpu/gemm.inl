// The kernels of conv_kernels.h, by vectors of AVX-512 or AVX2. A step of bf16 is a pair of values with AVX-512 BF16;
// elsewhere one value, which is widened to fp32 when it is copied or packed.

#if defined(RESNET_FAST_AVX512)
using Vector = __m512;
constexpr int kVector = 16;
template <int kVectors>
constexpr int kTileRows = 14;
template <int kVectors>
constexpr int kHalf = 7;

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
// Sixteen values of a row of sums, from `part` on; those of a row of one vector are its first.
template <int kVectors>
inline __attribute__((always_inline)) Lanes<float> lanes(const Vector (&row)[kVectors], int part) {
  return {row[part]};
}
#else
using Vector = __m256;
constexpr int kVector = 8;
template <int kVectors>
constexpr int kTileRows = 12 / kVectors;
template <int kVectors>
constexpr int kHalf = kVectors == 1 ? 6 : kTileRows<kVectors>;

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
template <int kVectors>
inline __attribute__((always_inline)) Lanes<float> lanes(const Vector (&row)[kVectors], int part) {
  if constexpr (kVectors == 1) return {row[0], _mm256_setzero_ps()};
  return {row[2 * part], row[2 * part + 1]};
}
#endif

// Vectors of a row of a tile and of a step of B, the template argument kVectors: wide tiles, and those for groups.
constexpr int kWide = kColumns / kVector;
// Values of a row that the epilogue takes at once, and of a panel that are packed at once.
template <int kVectors>
constexpr int kPart = kVectors * kVector < 16 ? kVectors * kVector : 16;
// Steps per iteration. Narrow tiles have few FMAs per step, and would need as many other instructions; their stretches
// are multiples of 8 channels.
template <int kVectors>
constexpr int kUnroll = kVector == 8 && kVectors < kWide ? 4 : 1;
constexpr int kStepBytes = 4;  // between steps of A in unpacked pixels; those of B in packed ones
#if defined(RESNET_FAST_AVX512_BF16)
constexpr int kValues = 2;  // per step
#else
constexpr int kValues = 1;
#endif

// The value of A in row `row` of a group (0 to 3) at p, and `at` bytes after it.
template <int kVectors>
inline __attribute__((always_inline)) Vector value(const char* p, int64_t lda, int64_t lda3, int row, int at) {
#if !defined(RESNET_FAST_AVX512)
  if constexpr (kVectors < kWide) {
    // In assembly, because GCC 12 keeps lda + at for each step of an iteration, and has too few registers for them.
    // Nothing writes A between two reads.
    Vector v;
    if (row == 0) {
      asm("vbroadcastss %c2(%1), %0" : "=x"(v) : "r"(p), "i"(at));
    } else if (row == 2) {
      asm("vbroadcastss %c3(%1,%2,2), %0" : "=x"(v) : "r"(p), "r"(lda), "i"(at));
    } else {
      asm("vbroadcastss %c3(%1,%2), %0" : "=x"(v) : "r"(p), "r"(row == 1 ? lda : lda3), "i"(at));
    }
    return v;
  }
#endif
  return broadcast((row == 0 ? p : row == 1 ? p + lda : row == 2 ? p + 2 * lda : p + lda3) + at);
}

#if !defined(RESNET_FAST_AVX512)
// A stretch of a full tile. `ahead` is advanced over the steps that are done in fours.
struct Operands {
  const char *a, *b;
  int64_t lda, steps;
  const char* ahead;
  int64_t ahead_step;
};

// sum += A·B of a full tile. In assembly: twelve sums, three values of A and a vector of B take all sixteen registers,
// and GCC 12 stores and reloads one of the sums in every iteration.
template <int kStep>
inline __attribute__((always_inline)) void multiply_full(Operands& operands, Vector (&sum)[3][kWide]) {
#define RESNET_FAST_COLUMN(at, sum0, sum1, sum2)   \
  "vmovups " at "(%%rcx), %%ymm15\n"               \
  "vfmadd231ps %%ymm15, %%ymm12, %[" #sum0 "]\n"   \
  "vfmadd231ps %%ymm15, %%ymm13, %[" #sum1 "]\n"   \
  "vfmadd231ps %%ymm15, %%ymm14, %[" #sum2 "]\n"
#define RESNET_FAST_STEP(i)                               \
  "vbroadcastss %c[step]*" #i "(%%rax), %%ymm12\n"        \
  "vbroadcastss %c[step]*" #i "(%%rax,%%rsi), %%ymm13\n"  \
  "vbroadcastss %c[step]*" #i "(%%rax,%%rsi,2), %%ymm14\n" \
  RESNET_FAST_COLUMN("128*" #i, s00, s10, s20)            \
  RESNET_FAST_COLUMN("128*" #i "+32", s01, s11, s21)      \
  RESNET_FAST_COLUMN("128*" #i "+64", s02, s12, s22)      \
  RESNET_FAST_COLUMN("128*" #i "+96", s03, s13, s23)
  static_assert(kPanelStep == 128 && kTileRows<kWide> == 3 && sizeof(Operands) == 48);
  asm volatile(
      "mov (%[operands]), %%rax\n"
      "mov 8(%[operands]), %%rcx\n"
      "mov 16(%[operands]), %%rsi\n"
      "mov 24(%[operands]), %%rdx\n"
      "mov 32(%[operands]), %%r8\n"
      "mov 40(%[operands]), %%r9\n"
      "sub $4, %%rdx\n"
      "jl 2f\n"
      "1:\n"  // four steps
      "prefetcht1 (%%r8)\n"
      RESNET_FAST_STEP(0) RESNET_FAST_STEP(1)
      "prefetcht1 (%%r8,%%r9,2)\n"
      RESNET_FAST_STEP(2) RESNET_FAST_STEP(3)
      "lea (%%r8,%%r9,4), %%r8\n"
      "add $4*%c[step], %%rax\n"
      "add $4*128, %%rcx\n"
      "sub $4, %%rdx\n"
      "jge 1b\n"
      "mov %%r8, 32(%[operands])\n"
      "2:\n"
      "add $4, %%rdx\n"
      "jz 4f\n"
      "3:\n"  // the rest, one by one
      RESNET_FAST_STEP(0)
      "add $%c[step], %%rax\n"
      "add $128, %%rcx\n"
      "dec %%rdx\n"
      "jnz 3b\n"
      "4:\n"
      : [s00] "+x"(sum[0][0]), [s01] "+x"(sum[0][1]), [s02] "+x"(sum[0][2]), [s03] "+x"(sum[0][3]),
        [s10] "+x"(sum[1][0]), [s11] "+x"(sum[1][1]), [s12] "+x"(sum[1][2]), [s13] "+x"(sum[1][3]),
        [s20] "+x"(sum[2][0]), [s21] "+x"(sum[2][1]), [s22] "+x"(sum[2][2]), [s23] "+x"(sum[2][3])
      : [operands] "r"(&operands), [step] "i"(kStep)
      : "rax", "rcx", "rdx", "rsi", "r8", "r9", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
#undef RESNET_FAST_STEP
#undef RESNET_FAST_COLUMN
}
#endif

// Rows are in groups of four or three, at p, p + lda, p + 2·lda, p + 3·lda: x86 address modes with one pointer and
// two strides. Each half of an AVX-512 tile has two groups. kStep is product.a_step as a constant, which
// saves a register. Prefetches are spread over the steps: many at once would fill the CPU's buffers and stall.
template <int kRows, int kVectors, int kStep>
inline __attribute__((always_inline)) void accumulate(Product& product, Vector (&sum)[kRows][kVectors]) {
  constexpr int half = kHalf<kVectors>, kGroups = kRows > half + 4 ? 4 : kRows > half ? 3 : kRows > 4 ? 2 : 1;
  const int64_t lda = product.lda, lda3 = 3 * lda;
  const int64_t half_a = product.half_a, offset[4] = {0, 4 * lda, half_a, half_a + 4 * lda};
  const char* ahead = product.ahead ? product.ahead : product.b;
  const Stretch* stretches = product.stretches;
  for (int64_t i = 0; i < product.count; ++i) {
    const char* group[kGroups];
    for (int g = 0; g < kGroups; ++g) group[g] = product.a + stretches[i].a + offset[g];
    const char* b = product.b + stretches[i].b;
#if !defined(RESNET_FAST_AVX512)
    if constexpr (kVectors == kWide && kRows == kTileRows<kWide>) {
      Operands operands = {group[0], b, lda, stretches[i].steps, ahead, product.ahead_step};
      multiply_full<kStep>(operands, sum);
      ahead = operands.ahead;
      continue;
    }
#endif
    for (int64_t steps = stretches[i].steps; steps > 0; steps -= kUnroll<kVectors>) {
#pragma GCC unroll 4
      for (int step = 0; step < kUnroll<kVectors>; ++step) {
        Vector columns[kVectors];
        for (int j = 0; j < kVectors; ++j, b += sizeof(Vector)) columns[j] = load(b);
#pragma GCC unroll 14
        for (int row = 0; row < kRows; ++row) {
          const int in_half = row % half;
          const Vector a = value<kVectors>(group[row / half * 2 + in_half / 4], lda, lda3, in_half % 4, step * kStep);
          for (int j = 0; j < kVectors; ++j) sum[row][j] = multiply_add(a, columns[j], sum[row][j]);
        }
        if (step % 2 == 0) _mm_prefetch(ahead + step * product.ahead_step, _MM_HINT_T1);
      }
      for (int g = 0; g < kGroups; ++g) group[g] += kUnroll<kVectors> * kStep;
      ahead += kUnroll<kVectors> * product.ahead_step;
    }
  }
  if (product.ahead) product.ahead = ahead;
}

template <int kCount, class T>
inline __attribute__((always_inline)) void store_lanes(Lanes<float> v, T* y) {
#if defined(RESNET_FAST_AVX512_BF16)
  static_assert(kCount == 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v.v));
#else
  v.store(y, kCount);
#endif
}

// Adds the previous value last, so that the rounding error grows with the chain, not with the whole sum.
template <int kRows, int kVectors, int kStep>
inline __attribute__((always_inline)) void add_rows(Product& product, bool add_to, float* to, int64_t ld) {
  Vector sum[kRows][kVectors] = {};
  for (int row = 0; add_to && row < kRows; ++row) {
    _mm_prefetch(reinterpret_cast<const char*>(to + row * ld), _MM_HINT_T0);
    if (kVectors * kVector > 16) _mm_prefetch(reinterpret_cast<const char*>(to + row * ld + 16), _MM_HINT_T0);
  }
  accumulate<kRows, kVectors, kStep>(product, sum);
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* at = to + row * ld + kVector * j;
      store(at, add_to ? add(load(at), sum[row][j]) : sum[row][j]);
    }
  }
}

// The epilogue of a tile with the sums sum(row, part).
template <int kRows, int kVectors, class T, class F>
inline __attribute__((always_inline)) void finish(
    F sum, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>& epilogue) {
  constexpr int n = kPart<kVectors>, parts = kVectors * kVector / n;
#pragma GCC unroll 2
  for (int part = 0; part < parts; ++part) {  // a part of all rows, so that its scale and shift stay in registers
    const int column = n * part;
    const auto scale = epilogue.scale ? Lanes<float>::load(epilogue.scale + column, n) : Lanes<float>::broadcast(1);
    const auto shift = epilogue.shift ? Lanes<float>::load(epilogue.shift + column, n) : Lanes<float>::broadcast(0);
#pragma GCC unroll 14
    for (int row = 0; row < kRows; ++row) {
      Lanes<float> v = sum(row, part);
      if (epilogue.partial) v = v + Lanes<float>::load(epilogue.partial + row * kVectors * kVector + column, n);
      v = fma(v, scale, shift);  // the shift after the sum: a large shift in it would cost precision
      const int64_t at = row / kHalf<kVectors> * half_y + row % kHalf<kVectors> * ldy + column;
      if (epilogue.residual) v = v + Lanes<float>::load(epilogue.residual + at, n);
      if (epilogue.relu) v = v.relu();
      store_lanes<n>(v, y + at);
    }
  }
}

template <int kRows, int kVectors, class T>
inline __attribute__((always_inline)) void store_rows(
    Product& product, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>& epilogue) {
  if (epilogue.residual) {  // prefetched during the sum
    for (int row = 0; row < kRows; ++row) {
      const T* p = epilogue.residual + row / kHalf<kVectors> * half_y + row % kHalf<kVectors> * ldy;
      _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
      if (sizeof(T) > 2) _mm_prefetch(reinterpret_cast<const char*>(p + 16), _MM_HINT_T0);
    }
  }
  const int64_t n = product.count, first = chain(product.stretches, n);
  if (first == n) {
    Vector sum[kRows][kVectors] = {};
    accumulate<kRows, kVectors, kStepBytes>(product, sum);
    finish<kRows, kVectors>([&](int row, int part) { return lanes(sum[row], part); }, y, ldy, half_y, epilogue);
    return;
  }
  alignas(64) float sums[kRows][kVectors * kVector];
  Product part = product;
  for (int64_t i = 0; i < n; i += part.count) {
    part.stretches = product.stretches + i;
    part.count = chain(part.stretches, n - i);
    add_rows<kRows, kVectors, kStepBytes>(part, i > 0, sums[0], kVectors * kVector);
  }
  product.ahead = part.ahead;
  constexpr int size = kPart<kVectors>;
  finish<kRows, kVectors>(
      [&](int row, int part) { return Lanes<float>::load(sums[row] + size * part, size); }, y, ldy, half_y, epilogue);
}

// Tiles whose rows follow each other.
template <int kRows, int kVectors, class T>
void store_run(int tiles, Product product, T* y, int64_t ldy, int64_t half_y, Epilogue<T> epilogue) {
  for (; tiles > 0; --tiles) {
    store_rows<kRows, kVectors>(product, y, ldy, half_y, epilogue);
    product.a += kRows * product.lda;
    y += kRows * ldy;
    if (epilogue.residual) epilogue.residual += kRows * ldy;
    if (epilogue.partial) epilogue.partial += kRows * kVectors * kVector;
  }
}
template <int kRows, int kVectors>
void sum_run(int tiles, Product product, bool add, float* sum, int64_t ld) {
  for (; tiles > 0; --tiles) {
    add_rows<kRows, kVectors, kStepBytes>(product, add, sum, ld);
    product.a += kRows * product.lda;
    sum += kRows * ld;
  }
}

// f(std::integral_constant<int, rows>) for rows in 1..kRows.
template <int kRows, class F>
inline __attribute__((always_inline)) void with_rows(int rows, F f) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return f(std::integral_constant<int, kRows>());
    with_rows<kRows - 1>(rows, f);
  }
}

template <int kVectors, class T>
void store_tile(
    const Rows& rows, const Product& product, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>& epilogue, int&) {
  with_rows<kTileRows<kVectors>>(rows.first + rows.second, [&](auto r) {
    store_run<r.value, kVectors>(rows.tiles, product, y, ldy, half_y, epilogue);
  });
}

template <int kVectors>
void sum_tile(const Rows& rows, const Product& product, bool add, float* sum, int64_t ld) {
  with_rows<kTileRows<kVectors>>(rows.first + rows.second, [&](auto r) {
    sum_run<r.value, kVectors>(rows.tiles, product, add, sum, ld);
  });
}

// `tiles` tiles of a panel of A.
template <int kRows>
inline __attribute__((always_inline)) void add_tiles(int tiles, Product& product, bool add, float*& to, int64_t ld) {
  for (; tiles > 0; --tiles, product.a += kRows * product.lda, to += kRows * ld) {
    add_rows<kRows, kWide, kPanelStep>(product, add, to, ld);
  }
}

void add_panel(Product product, bool add, float* to, int64_t ld, int&) {
  constexpr int tiles = (kColumns + kTileRows<kWide> - 1) / kTileRows<kWide>, rows = kColumns / tiles;
  add_tiles<rows + 1>(kColumns % tiles, product, add, to, ld);
  add_tiles<rows>(tiles - kColumns % tiles, product, add, to, ld);
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

// kVector steps of a filter whose values are at `from`.
inline Vector steps_at(const char* from, bool is_float) {
#if defined(RESNET_FAST_AVX512_BF16)
  if (is_float) return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(load(from + sizeof(Vector)), load(from)));
#else
  (void)is_float;
#endif
  return load(from);
}

// A few filters at a time, so that the CPU prefetches them, and as many steps of them as panels of L1 hold.
template <int kVectors>
void pack_outer(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed) {
  constexpr int64_t size = kVectors * sizeof(Vector);  // of a step
  const int64_t value = is_float ? sizeof(float) : sizeof(bf16), whole = inner / (kValues * kVector) * kVector;
  for (int64_t begin = 0, end; begin < whole; begin = end) {
    end = std::min(begin + kChain, whole);
    for (int j = 0; j < kVectors; ++j) {
      const char* first = static_cast<const char*>(w) + kVector * j * ld * value;
      for (int64_t step = begin; step < end; step += kVector) {
        Vector row[kVector];
#pragma GCC unroll 16
        for (int i = 0; i < kVector; ++i) row[i] = steps_at(first + (i * ld + step * kValues) * value, is_float);
        transpose(row);
#pragma GCC unroll 16
        for (int i = 0; i < kVector; ++i) store(packed + (step + i) * size + j * sizeof(Vector), row[i]);
      }
    }
  }
  packed += whole * size;
  for (int64_t i = whole * kValues; i < inner; i += kValues) {
    for (int j = 0; j < kVectors; ++j, packed += sizeof(Vector)) {
      const int64_t first = kVector * j * ld + i;
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

template <int kVectors, class W>
void pack_inner_of(const W* w, int64_t ld, int64_t outer, char* packed) {
  constexpr int n = kPart<kVectors>;
  for (int64_t o = 0; o < outer; o += kValues, w += kValues * ld) {
    for (int part = 0; part < kVectors * kVector / n; ++part, packed += 4 * n) {
      const Lanes<float> low = Lanes<float>::load(w + n * part, n);
#if defined(RESNET_FAST_AVX512_BF16)
      store(packed, pairs(low.v, Lanes<float>::load(w + ld + n * part).v));
#else
      low.store(reinterpret_cast<float*>(packed), n);
#endif
    }
  }
}

template <int kVectors>
void pack_inner(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed) {
  is_float ? pack_inner_of<kVectors>(static_cast<const float*>(w), ld, outer, packed)
           : pack_inner_of<kVectors>(static_cast<const bf16*>(w), ld, outer, packed);
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
      for (int part = 0; part < kColumns / 16; ++part) {
        Lanes<float>::load(x + c + 16 * part).store(reinterpret_cast<float*>(to) + 16 * part);
      }
    }
#endif
  }
}

// kChecks: the products of joined groups need finite values. 0·v is NaN for others.
template <class T, bool kChecks>
bool copy_pixels(
    const T* x, int64_t ld, int64_t pixels, int64_t planes, int64_t width, char* to, int64_t pixel, int64_t plane) {
  constexpr bool plain = kValues * sizeof(T) == 4;
  constexpr int64_t value = 4 / kValues;
  if (planes == 1 && ld == width && pixel == width * value) width *= pixels, pixels = 1;
  if (plain && !kChecks && planes * pixels == 1) {
    std::memcpy(to, x, width * sizeof(T));
    return true;
  }
  Lanes<float> sum = Lanes<float>::broadcast(0);
  for (int64_t i = 0; i < pixels; ++i, x += ld) {
    const T* from = x;
    for (int64_t j = 0; j < planes; ++j, from += width) {
      char* at = to + j * plane + i * pixel;
      int64_t c = 0;
      for (; c + 16 <= width; c += 16, at += 16 * value) {
        if constexpr (plain) {
          std::memcpy(at, from + c, 16 * sizeof(T));
        } else {
          Lanes<float>::load(from + c).store(reinterpret_cast<float*>(at));
        }
        if constexpr (kChecks) sum = fma(Lanes<float>::load(from + c), Lanes<float>::broadcast(0), sum);
      }
      if (c == width) continue;
      const int rest = int(width - c);
      const Lanes<float> last = Lanes<float>::load(from + c, rest);
      last.store(reinterpret_cast<float*>(at), rest);
      if constexpr (kChecks) sum = fma(last, Lanes<float>::broadcast(0), sum);
    }
  }
  return sum.sum() == 0;
}

int64_t spin(int64_t steps) {
  constexpr int count = kTileRows<kWide> * kWide;
  Vector sum[count] = {}, a = {}, b = {};
  for (Vector& v : sum) asm volatile("" : "+v"(v));  // different values for the compiler, so that it keeps all products
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 28
    for (int i = 0; i < count; ++i) sum[i] = multiply_add(a, b, sum[i]);
  }
  for (Vector& v : sum) asm volatile("" : : "v"(v));
  return steps * count * 2 * kValues * kVector;
}

template <class T, int kVectors>
ConvKernels<T> kernels_of() {
  ConvKernels<T> k = {};
  k.columns = kVectors * kVector, k.rows = kTileRows<kVectors>, k.half = kHalf<kVectors>, k.values = kValues;
  k.widens = kValues * sizeof(T) < 4, k.ragged = false, k.steps = 1, k.depth = kChain;
  k.chained = k.rows < 4, k.tiles = kVector == 16 ? 4 : 8;
  k.scratch_bytes = 256 << 10, k.block_bytes = k.chained ? 0 : 32 << 10;
  k.dw_pixels = 256, k.dw_bytes = 640 << 10;
  k.store_tile = store_tile<kVectors, T>, k.sum_tile = sum_tile<kVectors>, k.add_panel = add_panel;
  k.pack_outer = pack_outer<kVectors>, k.pack_inner = pack_inner<kVectors>;
  k.pack_pixels = pack_pixels<T>, k.copy = copy_pixels<T, kVectors != kWide>, k.spin = spin;
  return k;
}

template <class T>
const ConvKernels<T>& conv_kernels(int columns) {
  static const ConvKernels<T> wide = kernels_of<T, kWide>(), half = kernels_of<T, kWide / 2>();
  if (columns > half.columns) return wide;
#if !defined(RESNET_FAST_AVX512)
  static const ConvKernels<T> quarter = kernels_of<T, kWide / 4>();
  if (columns <= quarter.columns) return quarter;
#endif
  return half;
}

#if !defined(RESNET_FAST_AVX512_BF16)
template const ConvKernels<float>& conv_kernels<float>(int);
#endif
template const ConvKernels<bf16>& conv_kernels<bf16>(int);
