// The inner kernels of our own convolutions (engine.cpp), for CPUs with AVX-512; T is float or bf16.
//
// Everything is a product C[rows][32] += Σ A[row][step]·B[step][32] over 4-byte steps: one fp32 value, or a
// pair of bf16 values whose products are summed in fp32. A tile is 14 rows of two 16-lane registers, which
// leaves 28 of 32 registers accumulating: 28 FMAs for 2 loads of B and 14 broadcasts of A.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace resnet_fast {

constexpr int kTileRows = 14;
constexpr int kHalf = 7;  // rows of half a tile; the halves need not follow each other
constexpr int kTileColumns = 32;
constexpr int64_t kPanelStep = kTileColumns * 4;  // bytes a step of B

// One stretch of the sum: `steps` steps from a and b. A(row, step) is at a + row·lda + step·a_step bytes in
// the first half of the tile, at a + half_a + (row − 7)·lda + step·a_step in the second; B(step) is at
// b + step·b_step. Strides are common to all stretches of a tile.
struct Stretch {
  const char *a, *b;
  int64_t steps;
};

struct TileStrides {
  int64_t lda, half_a, a_step, b_step;
};

// What happens to a finished tile: y = relu(sum + shift + residual), each optional.
template <class T>
struct Epilogue {
  const float* shift;  // [32]
  const T* residual;   // beside y
  bool relu;
};

template <class T>
struct ConvKernels {
  // y[row·ldy + column] = …, rows ≤ 14; rows from 7 at y[half_y + (row − 7)·ldy + column]
  void (*store_tile)(
      int rows, const Stretch*, int64_t n, const TileStrides&, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>&);
  // sum[row·ld + column] = … or, where `add`, += …
  void (*add_tile)(int rows, const Stretch*, int64_t n, const TileStrides&, bool add, float* sum, int64_t ld);
  // Filters [outer][inner] (inner contiguous, rows `ld` values apart, of type float or T) as B panels of 32
  // outer values (fprop) or of 32 inner values (dgrad): packed[step][32].
  void (*pack_outer)(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed);
  void (*pack_inner)(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed);
  // Pixels as steps: `channels` values (a multiple of 32) of `pixels` pixels `ld` values apart, as panels
  // `panel_bytes` apart, each [step][32]. The missing pixel of an odd bf16 pair is zero.
  void (*pack_pixels)(const T* x, int64_t ld, int64_t pixels, int64_t channels, char* packed, int64_t panel_bytes);
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

}  // namespace resnet_fast
