// The bf16 convolution tiles for AMX: C[32][32] in four tile registers of 16 by 16 fp32, with two registers for A and
// two for B. A group of 16 steps is four loads and four products of 16·16·32 multiply-adds. Filters and pixels are
// packed as for AVX-512 BF16, in the pairs that AMX multiplies.
#include "cpu_features.h"
#include "target.h"

#if RESNET_FAST_HAS_AMX
#define RESNET_FAST_AVX512
#define RESNET_FAST_AVX512_BF16
RESNET_FAST_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "../math.h"
#include "conv_kernels.h"
#include "kernels.h"

namespace resnet_fast::amx_bf16 {
#include "lanes.inl"
#include "transpose.inl"

constexpr int kHalf = 16, kGroup = 16;  // rows and steps of a tile register

// The configuration of the eight tile registers: 0 and 1 are the first half of C (left and right columns), 2 and 3 the
// second half; 4 and 5 are the halves of A, 6 and 7 the left and right columns of B.
struct Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

void reshape(int first, int second, int& shape) {
  const int asked = first << 8 | second;
  if (shape == asked) return;
  shape = asked;
  Shapes shapes;
  const uint8_t a0 = uint8_t(first), a1 = uint8_t(std::max(second, 1));
  const uint8_t all[8] = {a0, a0, a1, a1, a0, a1, kGroup, kGroup};
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = all[i];
    shapes.column_bytes[i] = 64;
  }
  asm volatile("" : : "r"(&shapes) : "memory");  // GCC's intrinsic claims to read 8 bytes of the 64
  _tile_loadconfig(&shapes);
}

void release() { _tile_release(); }

template <bool kTwo>
inline __attribute__((always_inline)) void accumulate(const Product& product) {
  const int64_t lda = product.lda, half_a = product.half_a;
  for (int64_t i = 0; i < product.count; ++i) {
    const Stretch& stretch = product.stretches[i];
    const char *a = product.a + stretch.a, *b = product.b + stretch.b;
    for (int64_t step = stretch.steps; step > 0; step -= kGroup) {
      _tile_loadd(6, b, kPanelStep);
      _tile_loadd(4, a, lda);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 64, kPanelStep);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, a + half_a, lda);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      a += kGroup * product.a_step;
      b += kGroup * kPanelStep;
    }
  }
}

struct Finisher {
  const Epilogue<bf16>& epilogue;
  bf16* y;
  int64_t ldy;
  __m512 scale[2], shift[2];

  Finisher(const Epilogue<bf16>& epilogue, bf16* y, int64_t ldy) : epilogue(epilogue), y(y), ldy(ldy) {
    for (int half = 0; half < 2; ++half) {
      scale[half] = epilogue.scale ? _mm512_loadu_ps(epilogue.scale + 16 * half) : _mm512_set1_ps(1);
      shift[half] = epilogue.shift ? _mm512_loadu_ps(epilogue.shift + 16 * half) : _mm512_setzero_ps();
    }
  }
  inline __attribute__((always_inline)) void row(const float* sum, int64_t at) const {
    Lanes<float> v[2];
    for (int half = 0; half < 2; ++half) {
      v[half] = {_mm512_fmadd_ps(_mm512_load_ps(sum + 16 * half), scale[half], shift[half])};
      if (epilogue.residual) v[half] = v[half] + Lanes<float>::load(epilogue.residual + at + 16 * half);
      if (epilogue.relu) v[half] = v[half].where(v[half].positive());
    }
    _mm512_storeu_si512(y + at, (__m512i)_mm512_cvtne2ps_pbh(v[1].v, v[0].v));
  }
  void rows(int count, const float* sum, int64_t at) const {
    for (int i = 0; i < count; ++i) row(sum + i * kColumns, at + i * ldy);
  }
  void run(const Rows& rows, const float* sum) const {
    int column = rows.column;
    int64_t at = 0;
    for (int i = 0; i < rows.first + rows.second; ++i, sum += kColumns) {
      if (column < rows.width) {
        row(sum, at);
        at += ldy;
      }
      if (++column == rows.pitch) column = 0;
    }
  }
};

template <bool kTwo>
inline __attribute__((always_inline)) void sum_up(const Product& product, float* sum) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  accumulate<kTwo>(product);
  _tile_stored(0, sum, kPanelStep);
  _tile_stored(1, sum + 16, kPanelStep);
  if constexpr (kTwo) {
    _tile_stored(2, sum + kHalf * kColumns, kPanelStep);
    _tile_stored(3, sum + kHalf * kColumns + 16, kPanelStep);
  }
}

void store_tile(
    const Rows& rows, const Product& product, bf16* y, int64_t ldy, int64_t half_y, const Epilogue<bf16>& epilogue,
    int& shape) {
  alignas(64) float sum[2 * kHalf * kColumns];
  reshape(rows.first, rows.second, shape);
  if (rows.second > 0) {
    sum_up<true>(product, sum);
  } else {
    sum_up<false>(product, sum);
  }
  const Finisher finisher(epilogue, y, ldy);
  if (rows.pitch > 0) {
    finisher.run(rows, sum);
    return;
  }
  finisher.rows(rows.first, sum, 0);
  finisher.rows(rows.second, sum + kHalf * kColumns, half_y);
}

void add_panel(Product product, bool add, float* to, int64_t ld, int& shape) {
  reshape(kHalf, kHalf, shape);
  float* second = to + kHalf * ld;
  const int64_t pitch = ld * int64_t(sizeof(float));
  if (add) {
    _tile_loadd(0, to, pitch);
    _tile_loadd(1, to + 16, pitch);
    _tile_loadd(2, second, pitch);
    _tile_loadd(3, second + 16, pitch);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  accumulate<true>(product);
  _tile_stored(0, to, pitch);
  _tile_stored(1, to + 16, pitch);
  _tile_stored(2, second, pitch);
  _tile_stored(3, second + 16, pitch);
}

// 16 rows of 16 4-byte lanes, `from` bytes apart, transposed to rows of 64 bytes at `to`.
inline void transpose(const char* packed, int64_t from, char* to) {
  __m512 row[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(packed + i * from);
  transpose(row);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + 64 * i, row[i]);
}

void turn(char* packed, int64_t steps) {
  alignas(64) char turned[kGroup * kPanelStep];
  for (int64_t step = 0; step < steps; step += kGroup, packed += sizeof(turned)) {
    transpose(packed, kPanelStep, turned);
    transpose(packed + 64, kPanelStep, turned + kHalf * 64);
    std::memcpy(packed, turned, sizeof(turned));
  }
}

bool copy(
    const bf16* x, int64_t ld, int64_t pixels, int64_t planes, int64_t, char* to, int64_t pixel, int64_t plane) {
  for (int64_t i = 0; i < pixels; ++i, x += ld) {
    for (int64_t j = 0; j < planes; ++j) {
      _mm512_storeu_si512(to + j * plane + i * pixel, _mm512_loadu_si512(x + 32 * j));
    }
  }
  return true;
}

int64_t spin(int64_t steps) {
  int shape = 0;
  reshape(kHalf, kHalf, shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  release();
  return steps * 4 * 2 * 2 * kHalf * kHalf * kGroup;
}

const ConvKernels<bf16>& conv_kernels() {
  static const ConvKernels<bf16> all = [] {
    ConvKernels<bf16> k = avx512_bf16::conv_kernels<bf16>();  // for its packing
    k.rows = 2 * kHalf, k.half = kHalf, k.tiles = 1, k.ragged = true, k.steps = kGroup, k.depth = 2 * kGroup;
    k.scratch_bytes = 512 << 10, k.block_bytes = 512 << 10;
    k.dw_pixels = 2048, k.dw_bytes = 1 << 20;
    k.store_tile = store_tile, k.sum_tile = nullptr, k.add_panel = add_panel, k.release = release;
    k.turn = turn, k.copy = copy, k.spin = spin;
    return k;
  }();
  return all;
}

}  // namespace resnet_fast::amx_bf16
RESNET_FAST_TARGET_END
#endif
