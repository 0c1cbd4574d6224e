// The inner kernels of resnet_fast's CPU convolutions (tiled_conv.cpp, wgrad.cpp); T is float or bf16. For CPUs with
// AVX2 or AVX-512 (gemm.inl), and with AMX for bf16 (kernels_amx_bf16.cpp).
//
// Each is a product C[rows][columns] += Σ A[row][step]·B[step][columns] over 4-byte steps: one fp32 value, or a pair of
// bf16 values whose products are accumulated in fp32. Where the CPU has no products of bf16, bf16 values are widened to
// fp32 steps. A tile is `rows` rows in two halves, which need not be adjacent:
//
//   AVX2     3 x 32    12 of 16 registers accumulate: 12 FMAs for 4 loads of B and 3 broadcasts of A
//   AVX-512  14 x 32   28 of 32 registers accumulate: 28 FMAs for 2 loads of B and 14 broadcasts of A
//   AMX      32 x 32   four accumulators of 16 by 16
//
// Groups of few channels take tiles of fewer columns, which waste fewer products: 6 x 16 and 12 x 8 with AVX2, 14 x 16
// with AVX-512.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace resnet_fast {

constexpr int kColumns = 32;                  // of a tile and a panel: channels and filters are multiples of this
constexpr int64_t kPanelStep = 4 * kColumns;  // bytes of B per step of a panel of kColumns
constexpr int64_t kChain = 256;               // steps that gemm.inl accumulates at once; longer sums add such parts

// One stretch of the sum: `steps` steps, `a` and `b` bytes after the product's A and B.
struct Stretch {
  int64_t a, b, steps;
};

// The number of `stretches` that one register accumulates: up to `most` steps, at least one stretch.
inline int64_t chain(const Stretch* stretches, int64_t n, int64_t most = kChain) {
  int64_t count = 0;
  for (int64_t sum = 0; count < n && (count == 0 || sum + stretches[count].steps <= most); ++count) {
    sum += stretches[count].steps;
  }
  return count;
}

// A tile's sum over its stretches. In a stretch A(row, step) is at a + row·lda + step·a_step bytes in the first
// half of the tile, at a + half_a + (row − half)·lda + step·a_step in the second; B(step) is at b + step·columns·4.
// If steps are grouped, the steps of a group are adjacent, and a_step is the distance between groups divided by the
// steps per group. `ahead` is what is needed next: it is prefetched to L2 during the sum, ahead_step bytes (at most 32,
// with AVX-512 64) per step, and advanced. AMX's tiles do not prefetch.
struct Product {
  const char *a, *b;
  const Stretch* stretches;
  int64_t count;
  int64_t lda, half_a, a_step;
  const char* ahead = nullptr;
  int64_t ahead_step = 0;

  // Prefetches `bytes` from `from` on, in `steps` steps of this sum and of those that continue it.
  void prefetch(const char* from, int64_t bytes, int64_t steps, int64_t most = 32) {
    ahead = from;
    ahead_step = std::min(most, (bytes + steps - 1) / steps);
  }
};

// The epilogue of a tile: y = relu(scale·(partial + sum) + shift + residual); each part is optional.
template <class T>
struct Epilogue {
  const float* partial;        // [rows][columns], from sum_tile
  const float *scale, *shift;  // [columns]
  const T* residual;           // indexed like y
  bool relu;
};

// The rows in use of a tile's first and second half. With `pitch`, they are a run across lines of `pitch` positions,
// starting at position `column` of a line. Rows at positions from `width` on are padding and are not stored; the rows
// of y follow each other without them. `tiles` tiles of such rows follow each other.
struct Rows {
  int first, second;
  int column = 0, width = 0, pitch = 0, tiles = 1;
};

template <class T>
struct ConvKernels {
  int columns;            // of a tile and a panel
  int rows, half;         // of a tile, and of its first half
  int values;             // of T per step
  bool widens;            // steps are one fp32 value, T is not
  bool ragged;            // the first half may be short even with a second one
  bool chained;           // few rows read B often: it must stay in L1, so longer sums are always added chain by chain
  int tiles;              // maximum per call
  int steps;              // per group; stretches are whole groups
  int64_t depth;          // maximum steps per stretch: all taps of these steps are multiplied while in L1
  int64_t scratch_bytes;  // of input that stays in L2 with a panel and the output
  int64_t block_bytes;    // of panels that are multiplied by a tile of pixels in sequence; at least one panel is
  int64_t dw_pixels;      // maximum pixels per block of dw,
  int64_t dw_bytes;       // and maximum bytes of its operands

  int64_t steps_of(int64_t values_) const { return (values_ + values - 1) / values; }
  int64_t value_bytes() const { return 4 / values; }  // of a value in A
  int64_t panel_step() const { return 4 * columns; }  // bytes of B per step

  // y[row·ldy + column] = …; rows of the second half at y[half_y + (row − half)·ldy + column]. `shape` is the
  // thread's tile configuration, 0 before the first tile. Call release() after the last tile; nullptr without AMX.
  void (*store_tile)(
      const Rows&, const Product&, T* y, int64_t ldy, int64_t half_y, const Epilogue<T>&, int& shape);
  // sum[row·ld + column] = … or, where `add`, += …, for A as in store_tile: products of more than kChain steps
  // are added chain by chain, all tiles of a panel before the next chain. nullptr for tiles that accumulate all steps
  // without a loss (AMX).
  void (*sum_tile)(const Rows&, const Product&, bool add, float* sum, int64_t ld);
  // sum[row·ld + column] = … or, where `add`, += … for the kColumns rows of a panel of A, by wide tiles.
  void (*add_panel)(Product, bool add, float* sum, int64_t ld, int& shape);
  void (*release)();
  // Filters [outer][inner] (inner contiguous, rows `ld` values apart; float, or T unless T is widened) as B panels of
  // `columns` outer values (fprop) or inner values (dgrad): packed[step][columns].
  void (*pack_outer)(const void* w, bool is_float, int64_t ld, int64_t inner, char* packed);
  void (*pack_inner)(const void* w, bool is_float, int64_t ld, int64_t outer, char* packed);
  // Pixels as steps: `channels` values (a multiple of 32) of `pixels` pixels, `ld` values apart, as panels
  // [step][columns], `panel_bytes` apart. With an odd number of bf16 pixels, zeros complete the last pair.
  void (*pack_pixels)(const T* x, int64_t ld, int64_t pixels, int64_t channels, char* packed, int64_t panel_bytes);
  // Copies pixels, `ld` values apart, as steps to planes [pixel][width], `plane` bytes apart: a plane holds `width` of
  // their values, `pixel` bytes apart, the next one those that follow. With fewer than 32 columns, returns whether all
  // values are finite.
  bool (*copy)(
      const T* x, int64_t ld, int64_t pixels, int64_t planes, int64_t width, char* to, int64_t pixel, int64_t plane);
  // Transposes a panel of pixels in place from B's order to A's: [step][32] to [group][32][steps of a group]. For tiles
  // that read a group of steps of many pixels at once (AMX), else nullptr.
  void (*turn)(char* packed, int64_t steps);
  // `steps` products for each accumulator of a tile, of operands in registers: the peak of the tiles. Returns the
  // floating-point operations.
  int64_t (*spin)(int64_t steps);
};

// The kernels for this CPU, of at least `columns` columns: 32, 16 or 8; nullptr if it has none.
template <class T>
const ConvKernels<T>* conv_kernels(int columns = kColumns);

namespace avx2 {
template <class T>
const ConvKernels<T>& conv_kernels(int columns = kColumns);
}
namespace avx512 {
template <class T>
const ConvKernels<T>& conv_kernels(int columns = kColumns);
}
namespace avx512_bf16 {
template <class T>
const ConvKernels<T>& conv_kernels(int columns = kColumns);
}
namespace amx_bf16 {
const ConvKernels<bf16>& conv_kernels();
}

}  // namespace resnet_fast
