// The inner kernels of resnet_fast's CPU convolutions (tiled_conv.cpp, wgrad.cpp); T is float or bf16. For CPUs with
// AVX-512 (gemm.inl), and with AMX for bf16 (kernels_amx_bf16.cpp).
//
// Each is a product C[rows][32] += Σ A[row][step]·B[step][32] over 4-byte steps: one fp32 value, or a pair of bf16
// values whose products are accumulated in fp32. A tile is `rows` rows of 32 values in two halves, which need not be
// adjacent. AVX-512 has tiles of 14 rows: 28 of 32 registers accumulate, with 28 FMAs for 2 loads of B and 14
// broadcasts of A. AMX has tiles of 32 rows: four accumulators of 16 by 16.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace resnet_fast {

constexpr int kTileColumns = 32;
constexpr int64_t kPanelStep = kTileColumns * 4;  // bytes per step of B
constexpr int64_t kChain = 256;                   // steps that gemm.inl accumulates at once; longer sums add such parts

// One stretch of the sum: `steps` steps, `a` and `b` bytes after the product's A and B.
struct Stretch {
  int64_t a, b, steps;
};

// A tile's sum over its stretches. In a stretch A(row, step) is at a + row·lda + step·a_step bytes in the first
// half of the tile, at a + half_a + (row − half)·lda + step·a_step in the second; B(step) is at b + step·kPanelStep.
// If steps are grouped, the steps of a group are adjacent, and a_step is the distance between groups divided by the
// steps per group.
struct Product {
  const char *a, *b;
  const Stretch* stretches;
  int64_t count;
  int64_t lda, half_a, a_step;
};

// The epilogue of a tile: y = relu(scale·sum + shift + residual); each part is optional.
template <class T>
struct Epilogue {
  const float *scale, *shift;  // [32]
  const T* residual;           // indexed like y
  bool relu;
};

// The rows in use of a tile's first and second half. With `pitch`, they are a run across lines of `pitch` positions,
// starting at position `column` of a line. Rows at positions from `width` on are padding and are not stored; the rows
// of y follow each other without them.
struct Rows {
  int first, second;
  int column = 0, width = 0, pitch = 0;
};

template <class T>
struct ConvKernels {
  int rows, half;         // of a tile, and of its first half
  bool ragged;            // the first half may be short even with a second one
  int steps;              // per group; stretches are whole groups
  int64_t depth;          // maximum steps per stretch: all taps of these steps are multiplied while in L1
  int64_t scratch_bytes;  // of input that stays in L2 with a panel and the output
  int64_t block_bytes;    // of panels that are multiplied by a tile of pixels in sequence
  int dw_parts;           // tiles of dw per 32 filters
  int64_t dw_pixels;      // maximum pixels per block of dw,
  int64_t dw_bytes;       // and maximum bytes of its operands

  // y[row·ldy + column] = …; rows of the second half at y[half_y + (row − half)·ldy + column]. `shape` is the
  // thread's tile configuration, 0 before the first tile. Call release() after the last tile; nullptr without AMX.
  void (*store_tile)(
      const Rows&, const Product&, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>&, int& shape);
  // sum[row·ld + column] = … or, where `add`, += …
  void (*add_tile)(int rows, const Product&, bool add, float* sum, int64_t ld, int& shape);
  void (*release)();
  // Filters [outer][inner] (inner contiguous, rows `ld` values apart, of type float or T) as B panels of 32
  // outer values (fprop) or of 32 inner values (dgrad): packed[step][32].
  void (*pack_outer)(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed);
  void (*pack_inner)(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed);
  // Pixels as steps: `channels` values (a multiple of 32) of `pixels` pixels, `ld` values apart, as panels
  // [step][32], `panel_bytes` apart. With an odd number of bf16 pixels, zeros complete the last pair.
  void (*pack_pixels)(const T* x, int64_t ld, int64_t pixels, int64_t channels, char* packed, int64_t panel_bytes);
  // The next two are for tiles that read a group of steps of many pixels at once (AMX), else nullptr.
  // Transposes a panel of pixels in place from B's order to A's: [step][32] to [group][32][steps of a group].
  void (*turn)(char* packed, int64_t steps);
  // Copies pixels to to[group][pixel], with groups `group_bytes` apart.
  void (*spread)(const T* x, int64_t pixels, int64_t channels, char* to, int64_t group_bytes);
};

// The kernels for this CPU; nullptr if it has none.
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
