// The inner kernels of our own convolutions (tiled_conv.cpp, wgrad.cpp); T is float or bf16. For CPUs with
// AVX-512 (gemm.inl), and with AMX for bf16 (kernels_amx_bf16.cpp).
//
// Everything is a product C[rows][32] += Σ A[row][step]·B[step][32] over 4-byte steps: one fp32 value, or a
// pair of bf16 values whose products are summed in fp32. A tile is `rows` rows of 32 values in two halves,
// which need not follow each other: 14 rows with AVX-512, which leaves 28 of 32 registers accumulating (28 FMAs
// for 2 loads of B and 14 broadcasts of A); 32 rows with AMX, four accumulators of 16 by 16.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace resnet_fast {

constexpr int kTileColumns = 32;
constexpr int64_t kPanelStep = kTileColumns * 4;  // bytes a step of B
constexpr int64_t kChain = 256;                   // steps of one sum of gemm.inl; longer ones are sums of sums

// One stretch of the sum: `steps` steps, `a` and `b` bytes from where a product's begin.
struct Stretch {
  int64_t a, b, steps;
};

// A tile's sum over its stretches. In a stretch A(row, step) is at a + row·lda + step·a_step bytes in the first
// half of the tile, at a + half_a + (row − half)·lda + step·a_step in the second; B(step) is at b + step·kPanelStep.
// With steps in groups, those of a group follow each other, and a_step is a group's distance from the next over its
// steps.
struct Product {
  const char *a, *b;
  const Stretch* stretches;
  int64_t count;
  int64_t lda, half_a, a_step;
};

// What happens to a finished tile: y = relu(scale·sum + shift + residual), each optional.
template <class T>
struct Epilogue {
  const float *scale, *shift;  // [32]
  const T* residual;           // beside y
  bool relu;
};

// How much of a tile there is: rows of its first half and of its second. Where `pitch` is given, they are a run
// across lines of `pitch` positions, from position `column` of one: rows at positions from `width` on are none of y,
// whose rows follow each other without them.
struct Rows {
  int first, second;
  int column = 0, width = 0, pitch = 0;
};

template <class T>
struct ConvKernels {
  int rows, half;         // of a tile, and of its first half
  bool ragged;            // the first half may be short although there is a second
  int steps;              // of a group: stretches are whole groups
  int64_t depth;          // steps of a stretch at the most: one tap after another meets them, while they are in L1
  int64_t scratch_bytes;  // of input that stays in L2 beside a panel and the output
  int64_t block_bytes;    // of panels that a tile of pixels meets one after another
  int dw_parts;           // tiles of dw that 32 filters are cut into
  int64_t dw_pixels;      // pixels of a block of dw at the most,
  int64_t dw_bytes;       // and bytes of its operands

  // y[row·ldy + column] = …; rows of the second half at y[half_y + (row − half)·ldy + column]. `shape` is of the
  // thread's tile registers, 0 before the first tile; release() after the last, nullptr where there are none.
  void (*store_tile)(
      const Rows&, const Product&, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>&, int& shape);
  // sum[row·ld + column] = … or, where `add`, += …
  void (*add_tile)(int rows, const Product&, bool add, float* sum, int64_t ld, int& shape);
  void (*release)();
  // Filters [outer][inner] (inner contiguous, rows `ld` values apart, of type float or T) as B panels of 32
  // outer values (fprop) or of 32 inner values (dgrad): packed[step][32].
  void (*pack_outer)(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed);
  void (*pack_inner)(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed);
  // Pixels as steps: `channels` values (a multiple of 32) of `pixels` pixels `ld` values apart, as panels
  // `panel_bytes` apart, each [step][32]. The missing pixel of an odd bf16 pair is zero.
  void (*pack_pixels)(const T* x, int64_t ld, int64_t pixels, int64_t channels, char* packed, int64_t panel_bytes);
  // Where tiles read a group of steps of many pixels at once, two more; else nullptr.
  // A panel of pixels turned in place from B's order to A's: [step][32] becomes [group][32][steps of a group].
  void (*turn)(char* packed, int64_t steps);
  // Pixels with their groups of steps `group_bytes` apart: to[group][pixel].
  void (*spread)(const T* x, int64_t pixels, int64_t channels, char* to, int64_t group_bytes);
};

// The table for this CPU, nullptr where it has none.
template <class T>
const ConvKernels<T>* conv_kernels();

namespace avx512 {
const ConvKernels<float>& conv_kernels();
}
namespace avx512_bf16 {
const ConvKernels<bf16>& conv_kernels();
}
namespace amx_bf16 {
const ConvKernels<bf16>& conv_kernels();
}

}  // namespace resnet_fast
