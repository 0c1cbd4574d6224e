// dw of resnet_fast's CPU convolutions (tiled_conv.h).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bands.h"
#include "conv_kernels.h"
#include "memory.h"
#include "tiled_conv.h"
#include "winograd.h"

namespace resnet_fast::cpu {
namespace {

// The pixels of one block of dw: bands of equal width, possibly of several images.
using Block = std::vector<Band>;

// Blocks of about `most` pixels: runs of columns of a single-row image, or whole rows.
std::vector<Block> cut_blocks(const ConvShape& s, int64_t most) {
  std::vector<Block> blocks;
  if (s.rows == 1 && s.tap_count() == 1) {
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t q = 0; q < s.columns; q += most) blocks.push_back({{n, 0, 1, q, std::min(s.columns, q + most)}});
    }
    return blocks;
  }
  const int64_t rows = std::max<int64_t>(1, most / s.columns);
  const int64_t part = ceil_div(s.rows, ceil_div(s.rows, rows));
  int64_t room = 0;
  for (int64_t n = 0; n < s.images; ++n) {
    for (int64_t p = 0; p < s.rows; p += part) {
      const Band band = {n, p, std::min(s.rows, p + part), 0, s.columns};
      if (room < band.p1 - band.p0) {
        blocks.emplace_back();
        room = std::max(rows, band.p1 - band.p0);
      }
      blocks.back().push_back(band);
      room -= band.p1 - band.p0;
    }
  }
  return blocks;
}

// One row of x from column0 to column1, zero outside the image; in place if all of it is inside, else in `line`.
template <class T>
const T* input_row(
    const ConvShape& s, const T* x, const FillRow<T>& fill, int64_t image, int64_t i, int64_t column0,
    int64_t column1, T* line) {
  const int64_t begin = std::max<int64_t>(0, column0), end = std::min(s.width, column1);
  const int64_t pixel = (image * s.height + i) * s.width + begin, values = (column1 - column0) * s.channels;
  if (i < 0 || i >= s.height || begin >= end) {
    std::memset(static_cast<void*>(line), 0, values * sizeof(T));
    return line;
  }
  if (x != nullptr && begin == column0 && end == column1) return x + pixel * s.channels;
  T *first = line + (begin - column0) * s.channels, *last = line + (end - column0) * s.channels;
  std::memset(static_cast<void*>(line), 0, (first - line) * sizeof(T));
  std::memset(static_cast<void*>(last), 0, (line + values - last) * sizeof(T));
  if (x != nullptr) {
    std::memcpy(static_cast<void*>(first), x + pixel * s.channels, (last - first) * sizeof(T));
  } else {
    fill(image, i, begin, end, first);
  }
  return line;
}

}  // namespace

// For each block of pixels whose operands fit L2: pack panels of filters of dz, [row][step][columns], and of channels
// of x for each column tap, [row][step][columns]; a step is one pixel in fp32 arithmetic, two in products of bf16. Then
// accumulate dw[filters][tap][channels] += dzᵀ·x, a panel of dz by a panel of x. Rows of x are ordered by their
// remainder modulo the stride, so that the rows that consecutive output rows read are adjacent, and a band is one
// stretch. If a band is not a whole number of groups of steps, zeros of dz complete it, and multiply whatever follows in
// x. Tasks are chunks of filters × lanes of blocks. Each lane has separate sums; the lanes are added in order.
template <class T>
at::Tensor tiled_conv_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz) {
  if (winograd_keeps<T>(shape)) return winograd_wgrad(shape, x, fill, dz);
  const ConvShape s = flattened(shape);
  const ConvKernels<T>& kernels = *conv_kernels<T>();
  const Axis rows = fprop_axis(s.height, s.rows, s, 0), columns = fprop_axis(s.width, s.columns, s, 1);
  const int64_t taps = s.tap_count(), size = s.filters * taps * s.channels, threads = at::get_num_threads();
  constexpr int64_t width = kColumns, panel_step = kPanelStep;
  const int64_t panels = s.channels / width, group_steps = kernels.steps;
  // Sums that do not fit L2 are divided among the threads; smaller ones are duplicated.
  const int64_t share = size < (256 << 10) ? s.filters : ceil_div(s.filters / width, threads) * width;
  const int64_t chunk = std::min<int64_t>(share, 512), chunks = ceil_div(s.filters, chunk);
  const int64_t pixel_bytes = (chunk + s.channels * s.taps[1]) * int64_t(sizeof(T));
  const std::vector<Block> blocks =
      cut_blocks(s, std::clamp<int64_t>(kernels.dw_bytes / pixel_bytes, 96, kernels.dw_pixels) / 2 * 2);
  const int64_t count = int64_t(blocks.size()), lanes = std::clamp<int64_t>(ceil_div(threads, chunks), 1, count);
  const at::Tensor sums = empty({lanes, size}, at::kFloat, at::MemoryFormat::Contiguous);
  std::vector<bool> met(rows.mul);  // whether a tap reads rows of x with this remainder
  for (int64_t r = 0; r < rows.taps; ++r) met[r * rows.slope % rows.mul] = true;
  // A in B's order, [step][columns], or transposed, [group][32][steps of a group].
  const int64_t lda = 4 * group_steps;

  // A band in a block: its steps, in dz also as whole groups; the steps of dz and the rows of x before it.
  struct Place {
    int64_t steps, whole_steps, before, row, rows_of_phase;
  };

  const auto run_block = [&](const Block& block, bool add, int64_t k0, int64_t filters, float* dw) {
    const Band& first = block[0];
    const int64_t column0 = columns.least(first.q0), column1 = columns.most(first.q1 - 1) + 1;
    const int64_t pixels = first.q1 - first.q0, row_steps = kernels.steps_of(pixels), row_bytes = row_steps * panel_step;
    std::vector<Place> places;
    int64_t a_steps = 0, in_rows = 0;
    for (const Band& band : block) {
      const int64_t n = (band.p1 - band.p0) * row_steps, whole = ceil_div(n, group_steps) * group_steps;
      const int64_t phase = ceil_div(rows.most(band.p1 - 1) + 1 - rows.least(band.p0), rows.mul);
      places.push_back({n, whole, a_steps, in_rows, phase});
      a_steps += whole, in_rows += phase * rows.mul;
    }
    // Panels are one cache line farther apart: at a power of two they would share cache sets.
    const int64_t over = (group_steps - 1) * panel_step;
    const int64_t a_panel = a_steps * panel_step + 64, b_panel = in_rows * row_bytes + over + 64;
    const int64_t a_panels = filters / width, copy = panels * b_panel;
    T* line = reinterpret_cast<T*>(scratch(0, (column1 - column0) * s.channels * int64_t(sizeof(T))));
    char *a = scratch(1, a_panels * a_panel), *b = scratch(2, s.taps[1] * copy);
    const auto clear = [&](char* at, int64_t n, int64_t panel_bytes, int64_t bytes) {
      for (int64_t i = 0; i < n && bytes > 0; ++i) std::memset(at + i * panel_bytes, 0, bytes);
    };

    for (size_t j = 0; j < block.size(); ++j) {
      const Band& band = block[j];
      const Place& place = places[j];
      char* to = a + place.before * panel_step;
      for (int64_t p = band.p0; p < band.p1; ++p) {
        const T* from = dz + ((band.image * s.rows + p) * s.columns + band.q0) * s.filters + k0;
        kernels.pack_pixels(from, s.filters, pixels, filters, to + (p - band.p0) * row_bytes, a_panel);
      }
      clear(to + place.steps * panel_step, a_panels, a_panel, (place.whole_steps - place.steps) * panel_step);
      const int64_t row0 = rows.least(band.p0), row1 = row0 + place.rows_of_phase * rows.mul;
      for (int64_t i = row0; i < row1; ++i) {
        const int64_t phase = (i - row0) % rows.mul, at = place.row + phase * place.rows_of_phase + (i - row0) / rows.mul;
        if (!met[phase]) {  // no tap reads it, except with the zeros that complete a band
          if (group_steps > 1) clear(b + at * row_bytes, s.taps[1] * panels, b_panel, row_bytes);
          continue;
        }
        const T* values = input_row(s, x, fill, band.image, i, column0, column1, line);
        for (int64_t tap = 0; tap < s.taps[1]; ++tap) {
          kernels.pack_pixels(
              values + tap * columns.slope * s.channels, columns.mul * s.channels, pixels, s.channels,
              b + tap * copy + at * row_bytes, b_panel);
        }
      }
    }
    clear(b + in_rows * row_bytes, s.taps[1] * panels, b_panel, over);
    if (kernels.turn) {
      for (int64_t i = 0; i < a_panels; ++i) kernels.turn(a + i * a_panel, a_steps);
    }

    std::vector<std::vector<Stretch>> stretches(s.taps[0]);  // per row of taps
    for (int64_t r = 0; r < s.taps[0]; ++r) {
      for (const Place& place : places) {
        const int64_t row = r * rows.slope, at = row % rows.mul * place.rows_of_phase + row / rows.mul;
        stretches[r].push_back({place.before * panel_step, (place.row + at) * row_bytes, place.whole_steps});
      }
    }
    Tiles state(kernels);
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const std::vector<Stretch>& row = stretches[tap / s.taps[1]];
        const char* plane = b + tap % s.taps[1] * copy + panel * b_panel;
        for (int64_t i = 0; i < a_panels; ++i) {
          const Product product = {a + i * a_panel, plane, row.data(), int64_t(row.size()), lda, lda * kernels.half,
                                   panel_step};
          float* to = dw + ((k0 + i * width) * taps + tap) * s.channels + panel * width;
          kernels.add_panel(product, add, to, taps * s.channels, state.shape);
        }
      }
    }
  };
  for_tasks(lanes * chunks, [&](int64_t task) {
    const int64_t lane = task / chunks, k0 = task % chunks * chunk, first = lane * count / lanes;
    for (int64_t i = first; i < (lane + 1) * count / lanes; ++i) {
      run_block(blocks[i], i > first, k0, std::min(chunk, s.filters - k0), sums.data_ptr<float>() + lane * size);
    }
  });
  at::Tensor dw = lanes == 1 ? sums[0] : sums.sum(0);
  return dw.view({s.filters, s.taps[0], s.taps[1], s.channels});
}

template at::Tensor tiled_conv_wgrad<float>(const ConvShape&, const float*, const FillRow<float>&, const float*);
template at::Tensor tiled_conv_wgrad<bf16>(const ConvShape&, const bf16*, const FillRow<bf16>&, const bf16*);

}  // namespace resnet_fast::cpu
