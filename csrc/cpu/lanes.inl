// Sixteen lanes of fp32 or fp64, with loads and stores of bf16, fp32 and fp64. Included once per
// instruction set, inside its namespace. Lanes<A> is an array that the compiler vectorizes for the
// target; fp32 on AVX2 and AVX-512 uses intrinsics.

template <class A>
struct Lanes {
  static constexpr int kWidth = 16;
  A v[kWidth];

  static Lanes broadcast(A x) {
    Lanes r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = x;
    return r;
  }
  template <class T>
  static Lanes load(const T* p, int n = kWidth) {
    Lanes r;
    if (n == kWidth) {
      for (int i = 0; i < kWidth; ++i) r.v[i] = widen<A>(p[i]);
    } else {
      for (int i = 0; i < kWidth; ++i) r.v[i] = i < n ? widen<A>(p[i]) : A(0);
    }
    return r;
  }
  template <class T>
  void store(T* p, int n = kWidth) const {
    if (n == kWidth) {
      for (int i = 0; i < kWidth; ++i) p[i] = narrow<T>(v[i]);
    } else {
      for (int i = 0; i < n; ++i) p[i] = narrow<T>(v[i]);
    }
  }
  // Bit i: not (v[i] ≤ 0), so NaN counts as positive.
  uint32_t positive() const {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= uint32_t(!(v[i] <= A(0))) << i;
    return bits;
  }
  // Bit i: v[i] > than[i], or v[i] is NaN, so that a maximum keeps NaN.
  uint32_t above(const Lanes& than) const {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= uint32_t(v[i] > than.v[i] || v[i] != v[i]) << i;
    return bits;
  }
  Lanes where(uint32_t bits) const {
    Lanes r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = (bits >> i) & 1 ? v[i] : A(0);
    return r;
  }
  Lanes where(uint32_t bits, const Lanes& other) const {
    Lanes r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = (bits >> i) & 1 ? v[i] : other.v[i];
    return r;
  }
  Lanes relu() const { return where(positive()); }
  A sum() const {
    A s[4] = {0, 0, 0, 0};
    for (int i = 0; i < kWidth; ++i) s[i % 4] += v[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
};

template <class A>
inline Lanes<A> operator+(Lanes<A> a, Lanes<A> b) {
  for (int i = 0; i < Lanes<A>::kWidth; ++i) a.v[i] += b.v[i];
  return a;
}
template <class A>
inline Lanes<A> operator-(Lanes<A> a, Lanes<A> b) {
  for (int i = 0; i < Lanes<A>::kWidth; ++i) a.v[i] -= b.v[i];
  return a;
}
template <class A>
inline Lanes<A> operator*(Lanes<A> a, Lanes<A> b) {
  for (int i = 0; i < Lanes<A>::kWidth; ++i) a.v[i] *= b.v[i];
  return a;
}
template <class A>
inline Lanes<A> fma(Lanes<A> a, Lanes<A> b, Lanes<A> c) {
  for (int i = 0; i < Lanes<A>::kWidth; ++i) a.v[i] = a.v[i] * b.v[i] + c.v[i];
  return a;
}

#if defined(RESNET_FAST_AVX512)

template <>
struct Lanes<float> {
  static constexpr int kWidth = 16;
  __m512 v;

  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* p, int n = kWidth) {
    return {n == kWidth ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p)};
  }
  static Lanes load(const bf16* p, int n = kWidth) {
    const __m256i half = n == kWidth ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                     : _mm256_maskz_loadu_epi16(first(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  void store(float* p, int n = kWidth) const {
    n == kWidth ? _mm512_storeu_ps(p, v) : _mm512_mask_storeu_ps(p, first(n), v);
  }
  void store(bf16* p, int n = kWidth) const {
    // Round to nearest even on the integer image; NaN stays a quiet NaN.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
    n == kWidth ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half)
                : _mm256_mask_storeu_epi16(p, first(n), half);
  }
  uint32_t positive() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
  uint32_t above(const Lanes& than) const {
    return _mm512_cmp_ps_mask(v, than.v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  Lanes where(uint32_t bits) const { return {_mm512_maskz_mov_ps(__mmask16(bits), v)}; }
  Lanes where(uint32_t bits, const Lanes& other) const { return {_mm512_mask_mov_ps(other.v, __mmask16(bits), v)}; }
  Lanes relu() const { return where(positive()); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

inline Lanes<float> operator+(Lanes<float> a, Lanes<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes<float> operator-(Lanes<float> a, Lanes<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes<float> operator*(Lanes<float> a, Lanes<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes<float> fma(Lanes<float> a, Lanes<float> b, Lanes<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

#elif defined(RESNET_FAST_AVX2)

template <>
struct Lanes<float> {
  static constexpr int kWidth = 16;
  __m256 lo, hi;

  static Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static __m256 widen8(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Lanes load(const float* p, int n = kWidth) {
    if (n == kWidth) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    if (n == 8) return {_mm256_loadu_ps(p), _mm256_setzero_ps()};
    float part[kWidth] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
  }
  static Lanes load(const bf16* p, int n = kWidth) {
    if (n == kWidth) return {widen8(p), widen8(p + 8)};
    if (n == 8) return {widen8(p), _mm256_setzero_ps()};
    bf16 part[kWidth] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
  }
  void store(float* p, int n = kWidth) const {
    if (n == kWidth) {
      _mm256_storeu_ps(p, lo);
      _mm256_storeu_ps(p + 8, hi);
    } else if (n == 8) {
      _mm256_storeu_ps(p, lo);
    } else {
      float part[kWidth];
      store(part);
      for (int i = 0; i < n; ++i) p[i] = part[i];
    }
  }
  static __m256i narrow8(__m256 x) {  // bf16 in the low halves; as on AVX-512
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
  }
  void store(bf16* p, int n = kWidth) const {
    // packus takes 128-bit parts of both in turn; the permutation puts them in order.
    const __m256i mixed = _mm256_packus_epi32(narrow8(lo), narrow8(hi));
    const __m256i half = _mm256_permute4x64_epi64(mixed, 0xd8);
    if (n == kWidth) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    } else if (n == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(half));
    } else {
      bf16 part[kWidth];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), half);
      for (int i = 0; i < n; ++i) p[i] = part[i];
    }
  }
  uint32_t positive() const {
    const __m256 zero = _mm256_setzero_ps();
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(lo, zero, _CMP_NLE_UQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(hi, zero, _CMP_NLE_UQ))) << 8;
  }
  static __m256 keep8(__m256 x, uint32_t bits) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), place);
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, place)));
  }
  uint32_t above(const Lanes& than) const {
    const __m256 low = _mm256_or_ps(_mm256_cmp_ps(lo, than.lo, _CMP_GT_OQ), _mm256_cmp_ps(lo, lo, _CMP_UNORD_Q));
    const __m256 high = _mm256_or_ps(_mm256_cmp_ps(hi, than.hi, _CMP_GT_OQ), _mm256_cmp_ps(hi, hi, _CMP_UNORD_Q));
    return uint32_t(_mm256_movemask_ps(low)) | uint32_t(_mm256_movemask_ps(high)) << 8;
  }
  Lanes where(uint32_t bits) const { return {keep8(lo, bits), keep8(hi, bits >> 8)}; }
  Lanes where(uint32_t bits, const Lanes& other) const {
    const Lanes mine = where(bits), rest = other.where(~bits);
    return {_mm256_or_ps(mine.lo, rest.lo), _mm256_or_ps(mine.hi, rest.hi)};
  }
  static __m256 relu8(__m256 x) { return _mm256_and_ps(x, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
  Lanes relu() const { return {relu8(lo), relu8(hi)}; }
  float sum() const {
    float part[kWidth], s[4] = {0, 0, 0, 0};
    store(part);
    for (int i = 0; i < kWidth; ++i) s[i % 4] += part[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
};

inline Lanes<float> operator+(Lanes<float> a, Lanes<float> b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes<float> operator-(Lanes<float> a, Lanes<float> b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes<float> operator*(Lanes<float> a, Lanes<float> b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes<float> fma(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

#endif
