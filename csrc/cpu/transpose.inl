// A square of 4-byte lanes, transposed: lane j of row i becomes lane i of row j. Included inside the namespace of an
// instruction set.

#if defined(RESNET_FAST_AVX512)
inline __attribute__((always_inline)) void transpose(__m512 (&row)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // row[i + j]: lane j of each 128-bit part, rows i to i + 3
    row[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    row[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    row[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    row[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(row[j], row[4 + j], 0x88), odd = _mm512_shuffle_f32x4(row[j], row[4 + j], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) row[i] = t[i];
}
#else
inline __attribute__((always_inline)) void transpose(__m256 (&row)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // row[i + j]: lane j of each 128-bit part, rows i to i + 3
    row[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    row[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(row[j], row[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(row[j], row[4 + j], 0x31);
  }
  for (int i = 0; i < 8; ++i) row[i] = t[i];
}
#endif
