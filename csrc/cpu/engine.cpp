#include "engine.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "conv_kernels.h"
#include "cpu_features.h"
#include "memory.h"

namespace resnet_fast {

template <>
const ConvKernels<float>* conv_kernels() {
#if RESNET_FAST_X86_64
  static const ConvKernels<float>* best = active_isa() >= Isa::AVX512 ? &avx512::conv_kernels() : nullptr;
  return best;
#else
  return nullptr;
#endif
}

template <>
const ConvKernels<bf16>* conv_kernels() {
#if RESNET_FAST_X86_64
  static const ConvKernels<bf16>* best = active_isa() >= Isa::AVX512_BF16 ? &avx512_bf16::conv_kernels() : nullptr;
  return best;
#else
  return nullptr;
#endif
}

namespace cpu {
namespace {

constexpr int64_t kScratchBytes = 256 << 10;  // of a 1 MiB L2, beside the panel and the output

template <class T>
constexpr int64_t kStepValues = 4 / sizeof(T);

template <class T>
int64_t steps(int64_t values) {
  return (values + kStepValues<T> - 1) / kStepValues<T>;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `total` things in parts of equal size, the first total % parts one larger.
struct Cut {
  int64_t parts, total;
  int64_t begin(int64_t i) const { return i * (total / parts) + std::min(i, total % parts); }
};

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Scratch memory of this thread, kept between calls; `slot` tells buffers in use at once apart.
char* scratch(int slot, int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> buffers[3];
  thread_local int64_t sizes[3] = {0, 0, 0};
  if (sizes[slot] < bytes) {
    sizes[slot] = ceil_div(bytes, 4096) * 4096;
    buffers[slot].reset(static_cast<char*>(std::aligned_alloc(64, sizes[slot])));
    TORCH_CHECK(buffers[slot] != nullptr, "out of memory: ", sizes[slot], " bytes of scratch");
  }
  return buffers[slot].get();
}

// One axis of a convolution or of its transpose: output o and tap r meet input (o·mul + first + r·slope) / div,
// where that is whole.
struct Axis {
  int64_t input, output, taps, mul, div, first, slope;

  bool meets(int64_t o, int64_t r) const { return (o * mul + first + r * slope) % div == 0; }
  int64_t at(int64_t o, int64_t r) const { return (o * mul + first + r * slope) / div; }
  int64_t least(int64_t o) const { return floor_div(o * mul + first + std::min<int64_t>(0, (taps - 1) * slope), div); }
  int64_t most(int64_t o) const { return ceil_div(o * mul + first + std::max<int64_t>(0, (taps - 1) * slope), div); }
};

Axis fprop_axis(int64_t input, int64_t output, const ConvShape& s, int i) {
  return {input, output, s.taps[i], s.stride[i], 1, -s.padding[i], s.dilation[i]};
}

Axis dgrad_axis(int64_t input, int64_t output, const ConvShape& s, int i) {
  return {input, output, s.taps[i], 1, s.stride[i], s.padding[i], -s.dilation[i]};
}

template <class T>
struct Problem {
  int64_t images, channels, filters;
  Axis rows, columns;
  const T* x;              // or nullptr: through fill
  const FillRow<T>* fill;  // beside x: completes x in place first
  const char* panels;
  const float* shift;
  const T* residual;
  bool relu;
  T* y;
  const Finish* finish;
};

// Output rows [p0, p1) and columns [q0, q1) of one image.
struct Band {
  int64_t image, p0, p1, q0, q1;
};

// The input a band reads, zero-padded: row i, column j at base + (i − row0)·pitch + (j − column0)·channels.
template <class T>
struct Input {
  const T* base;
  int64_t row0, column0, pitch;
};

template <class T>
Input<T> lay_out(const Problem<T>& c, const Band& band) {
  const Axis &rows = c.rows, &columns = c.columns;
  const int64_t row0 = rows.least(band.p0), row1 = rows.most(band.p1 - 1) + 1;
  const int64_t column0 = columns.least(band.q0), column1 = columns.most(band.q1 - 1) + 1;
  const bool inside = row0 >= 0 && row1 <= rows.input && column0 >= 0 && column1 <= columns.input;
  if (c.x != nullptr && inside) {
    if (c.fill != nullptr && *c.fill) (*c.fill)(band.image, band.p0, band.q0, band.q1, nullptr);
    return {c.x + band.image * rows.input * columns.input * c.channels, 0, 0, columns.input * c.channels};
  }
  const int64_t pitch = (column1 - column0) * c.channels;
  T* base = reinterpret_cast<T*>(scratch(0, (row1 - row0) * pitch * int64_t(sizeof(T))));
  const int64_t begin = std::max<int64_t>(0, column0), end = std::min(columns.input, column1);
  for (int64_t i = row0; i < row1; ++i) {
    T* to = base + (i - row0) * pitch;
    if (i < 0 || i >= rows.input || begin >= end) {
      std::memset(static_cast<void*>(to), 0, pitch * sizeof(T));
      continue;
    }
    T* first = to + (begin - column0) * c.channels;
    std::memset(static_cast<void*>(to), 0, (first - to) * sizeof(T));
    const int64_t values = (end - begin) * c.channels;
    if (c.x != nullptr) {
      const T* from = c.x + ((band.image * rows.input + i) * columns.input + begin) * c.channels;
      std::memcpy(static_cast<void*>(first), from, values * sizeof(T));
    } else {
      (*c.fill)(band.image, i, begin, end, first);
    }
    std::memset(static_cast<void*>(first + values), 0, (to + pitch - first - values) * sizeof(T));
  }
  return {base, row0, column0, pitch};
}

// Panels [panel0, panel1) of one band, a panel of 32 filters at a time: every output row in tiles of at most 14 pixels, or two rows of at
// most 7 pixels in the halves of one tile.
template <class T>
void run_band(const Problem<T>& c, const Band& band, int64_t panel0, int64_t panel1) {
  const ConvKernels<T>& kernels = *conv_kernels<T>();
  const Input<T> in = lay_out(c, band);
  const Axis &rows = c.rows, &columns = c.columns;
  const int64_t depth = steps<T>(c.channels), tap_bytes = depth * kPanelStep;
  const int64_t panel_bytes = rows.taps * columns.taps * tap_bytes, y_row = columns.output * c.filters;
  // A pointwise convolution reads x where it is: its next pixels are fetched while a tile is made.
  const bool streams = in.base == c.x && rows.output == 1 && columns.div == 1 && columns.mul == 1;
  const bool halves = rows.div == 1 && columns.div == 1 && band.q1 - band.q0 == kHalf;
  TileStrides strides = {columns.mul * c.channels * int64_t(sizeof(T)), 0, 4, kPanelStep};
  std::vector<Stretch> stretches(rows.taps * columns.taps);

  // Pixels q, q + div, … of row p (and of row p + 1 in the second half).
  const auto tile = [&](int64_t panel, int64_t p, int64_t q, int64_t size, bool two) {
    const char* b = c.panels + panel * panel_bytes;
    int64_t n = 0;
    for (int64_t r = 0; r < rows.taps; ++r) {
      if (!rows.meets(p, r)) continue;
      const T* line = in.base + (rows.at(p, r) - in.row0) * in.pitch;
      for (int64_t s = 0; s < columns.taps; ++s) {
        if (!columns.meets(q, s)) continue;
        const T* first = line + (columns.at(q, s) - in.column0) * c.channels;
        stretches[n++] = {reinterpret_cast<const char*>(first), b + (r * columns.taps + s) * tap_bytes, depth};
      }
    }
    const int64_t ldy = columns.div * c.filters;
    const int64_t at = ((band.image * rows.output + p) * columns.output + q) * c.filters + panel * kTileColumns;
    const Epilogue<T> epilogue = {c.shift ? c.shift + panel * kTileColumns : nullptr,
                                  c.residual ? c.residual + at : nullptr, c.relu};
    strides.half_a = two ? rows.mul * in.pitch * int64_t(sizeof(T)) : kHalf * strides.lda;
    kernels.store_tile(
        int(two ? 2 * size : size), stretches.data(), n, strides, c.y + at, ldy, two ? y_row : kHalf * ldy, epilogue);
  };

  for (int64_t panel = panel0; panel < panel1; ++panel) {
    for (int64_t p = band.p0; p < band.p1; ++p) {
      if (halves && p + 1 < band.p1) {
        tile(panel, p++, band.q0, kHalf, true);
        continue;
      }
      for (int64_t phase = 0; phase < columns.div; ++phase) {
        const int64_t count = ceil_div(band.q1 - band.q0 - phase, columns.div);
        if (count <= 0) continue;
        const Cut cut = {ceil_div(count, kTileRows), count};
        for (int64_t i = 0; i < cut.parts; ++i) {
          if (streams && panel == panel0 && i + 1 < cut.parts) {
            const char* from = reinterpret_cast<const char*>(in.base + (band.q0 + cut.begin(i + 1)) * c.channels);
            const char* to = from + (cut.begin(i + 2) - cut.begin(i + 1)) * strides.lda;
            for (; from < to; from += 64) __builtin_prefetch(from, 0, 2);
          }
          tile(panel, p, band.q0 + phase + cut.begin(i) * columns.div, cut.begin(i + 1) - cut.begin(i), false);
        }
      }
    }
  }
}

// Bands of about kScratchBytes of input: whole rows of an image, or runs of columns where the image is one row.
template <class T>
std::vector<Band> cut(const Problem<T>& c) {
  const Axis &rows = c.rows, &columns = c.columns;
  std::vector<Band> bands;
  const int64_t row_bytes = columns.input * c.channels * int64_t(sizeof(T));
  if (rows.output == 1 && columns.div == 1 && columns.taps == 1) {
    const int64_t fits = std::max<int64_t>(2 * kTileRows, kScratchBytes / (c.channels * int64_t(sizeof(T))));
    const int64_t most = std::min<int64_t>(fits, 16 * kTileRows), threads = at::get_num_threads();
    const int64_t parts = ceil_div(ceil_div(columns.output, most), threads) * threads;  // as many for each thread
    const int64_t size = ceil_div(ceil_div(columns.output, parts), kTileRows) * kTileRows;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t q = 0; q < columns.output; q += size) {
        bands.push_back({n, 0, 1, q, std::min(columns.output, q + size)});
      }
    }
    return bands;
  }
  const int64_t in_rows = std::max<int64_t>(1, kScratchBytes / row_bytes - (rows.taps - 1) / rows.div);
  const int64_t most = std::clamp<int64_t>(in_rows * rows.div / rows.mul, 1, rows.output);
  // At least a band for each thread.
  const int64_t least = ceil_div(at::get_num_threads(), c.images);
  const int64_t parts = std::max(ceil_div(rows.output, most), std::min(least, rows.output));
  const int64_t size = ceil_div(rows.output, parts);
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t p = 0; p < rows.output; p += size) {
      bands.push_back({n, p, std::min(rows.output, p + size), 0, columns.output});
    }
  }
  return bands;
}

// f(task) for every task, each on the thread that is free first; which thread runs a task changes nothing.
template <class F>
void for_tasks(int64_t tasks, F f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task);
    }
  });
}

// All bands. Few of them (a small batch) are shared out by filters too, where nothing wants whole bands.
template <class T>
void run(const Problem<T>& c) {
  const std::vector<Band> bands = cut(c);
  const int64_t count = int64_t(bands.size()), panels = c.filters / kTileColumns;
  const bool completes = c.x != nullptr && *c.fill;  // fill writes x: one task a band
  if (!*c.finish && !completes) {
    const Cut groups = {std::clamp<int64_t>(ceil_div(4 * at::get_num_threads(), count), 1, panels), panels};
    for_tasks(count * groups.parts, [&](int64_t task) {
      const int64_t group = task % groups.parts;
      run_band(c, bands[task / groups.parts], groups.begin(group), groups.begin(group + 1));
    });
    return;
  }
  const int64_t tasks = std::min(count, kTasks);
  for_tasks(tasks, [&](int64_t task) {
    for (int64_t i = task * count / tasks; i < (task + 1) * count / tasks; ++i) {
      const Band& band = bands[i];
      run_band(c, band, 0, panels);
      const int64_t row = (band.image * c.rows.output + band.p0) * c.columns.output;
      const int64_t pixels = (band.p1 - band.p0) * (band.q1 - band.q0);
      if (*c.finish) (*c.finish)(task, row + band.q0, row + band.q0 + pixels);
    }
  });
}

// All pixels as one row where a convolution is a plain GEMM.
ConvShape flattened(ConvShape s) {
  if (s.pointwise()) {
    s.width = s.columns = s.images * s.height * s.width;
    s.images = s.height = s.rows = 1;
  }
  return s;
}

// Pixels of one block of dw: bands of one width, possibly of several images.
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

// One row of x from column0 to column1, zero outside the image: in place where it lies inside, else in `line`.
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

template <class T>
bool engine_takes(const ConvShape& s) {
  return conv_kernels<T>() != nullptr && s.channels % kTileColumns == 0 && s.filters % kTileColumns == 0 &&
         s.images * s.rows * s.columns > 0;
}

template <class T>
at::Tensor pack_filters(const at::Tensor& w, bool for_dgrad) {
  const at::Tensor rows = w.contiguous(at::MemoryFormat::ChannelsLast);  // [K][R·S][C]
  const bool is_float = w.scalar_type() == at::kFloat;
  const int64_t filters = w.size(0), channels = w.size(1), taps = w.size(2) * w.size(3), ld = taps * channels;
  const int64_t outer = for_dgrad ? channels : filters, inner = for_dgrad ? filters : channels;
  const int64_t tap_bytes = steps<T>(inner) * kPanelStep;
  at::Tensor packed = at::empty({outer / kTileColumns * taps * tap_bytes + 64}, w.options().dtype(at::kByte));
  char* to = reinterpret_cast<char*>(packed.data_ptr<uint8_t>());
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  const int64_t size = w.element_size();
  const ConvKernels<T>& kernels = *conv_kernels<T>();
  at::parallel_for(0, outer / kTileColumns * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / taps, tap = i % taps;
      if (for_dgrad) {
        kernels.pack_inner(from + (tap * channels + panel * kTileColumns) * size, is_float, ld, inner, to + i * tap_bytes);
      } else {
        kernels.pack_outer(from + (panel * kTileColumns * ld + tap * channels) * size, is_float, ld, inner, to + i * tap_bytes);
      }
    }
  });
  return packed;
}

template <class T>
void engine_fprop(
    const ConvShape& shape, const T* x, const FillRow<T>& fill, const at::Tensor& panels, const float* shift,
    const T* residual, bool relu, T* y, const Finish& finish) {
  const ConvShape s = flattened(shape);
  const Problem<T> c = {
      s.images, s.channels, s.filters, fprop_axis(s.height, s.rows, s, 0), fprop_axis(s.width, s.columns, s, 1),
      x, &fill, reinterpret_cast<const char*>(panels.const_data_ptr<uint8_t>()), shift, residual, relu, y, &finish};
  run(c);
}

template <class T>
void engine_dgrad(
    const ConvShape& shape, const T* dz, const FillRow<T>& fill, const at::Tensor& panels, T* dx,
    const Finish& finish) {
  const ConvShape s = flattened(shape);
  const Problem<T> c = {
      s.images, s.filters, s.channels, dgrad_axis(s.rows, s.height, s, 0), dgrad_axis(s.columns, s.width, s, 1),
      dz, &fill, reinterpret_cast<const char*>(panels.const_data_ptr<uint8_t>()), nullptr, nullptr, false, dx, &finish};
  run(c);
}

// For blocks of pixels that fit L2 beside each other: panels of 32 filters of dz, [row][step][32], and of 32
// channels of x for each column tap, [row][step][32], a step being one pixel of fp32 or two of bf16. Then
// dw[filters][tap][channels] += dzᵀ·x in tiles of a third of a panel of dz by a panel of x (11 rows keep the
// FMAs as busy as 14). Rows of x are ordered by their remainder by the stride, so that the rows an output row
// and the next one meet follow each other, and a band is one stretch. Tasks are chunks of filters times lanes
// of blocks; lanes have sums of their own, added in order.
template <class T>
at::Tensor engine_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz) {
  const ConvShape s = flattened(shape);
  const ConvKernels<T>& kernels = *conv_kernels<T>();
  const Axis rows = fprop_axis(s.height, s.rows, s, 0), columns = fprop_axis(s.width, s.columns, s, 1);
  const int64_t taps = s.tap_count(), size = s.filters * taps * s.channels, threads = at::get_num_threads();
  const int64_t panels = s.channels / kTileColumns;
  // Sums that do not fit L2 are shared out among the threads rather than kept by each.
  const int64_t share = size < (256 << 10) ? s.filters : ceil_div(s.filters / kTileColumns, threads) * kTileColumns;
  const int64_t chunk = std::min<int64_t>(share, 512), chunks = ceil_div(s.filters, chunk);
  const int64_t pixel_bytes = (chunk + s.channels * s.taps[1]) * int64_t(sizeof(T));
  const std::vector<Block> blocks = cut_blocks(s, std::clamp<int64_t>((640 << 10) / pixel_bytes, 96, 256) / 2 * 2);
  const int64_t count = int64_t(blocks.size()), lanes = std::clamp<int64_t>(ceil_div(threads, chunks), 1, count);
  const at::Tensor sums = empty({lanes, size}, at::kFloat, at::MemoryFormat::Contiguous);
  const Cut thirds = {3, kTileColumns};
  const TileStrides strides = {4, 4 * kHalf, kPanelStep, kPanelStep};

  const auto run_block = [&](const Block& block, bool add, int64_t k0, int64_t width, float* dw) {
    const Band& first = block[0];
    const int64_t column0 = columns.least(first.q0), column1 = columns.most(first.q1 - 1) + 1;
    const int64_t pixels = first.q1 - first.q0, row_bytes = steps<T>(pixels) * kPanelStep;
    int64_t out_rows = 0, in_rows = 0;
    for (const Band& band : block) {
      out_rows += band.p1 - band.p0;
      in_rows += ceil_div(rows.most(band.p1 - 1) + 1 - rows.least(band.p0), rows.mul) * rows.mul;
    }
    // One cache line more between panels: a power of two apart they would share cache sets.
    const int64_t a_panel = out_rows * row_bytes + 64, b_panel = in_rows * row_bytes + 64, copy = panels * b_panel;
    T* line = reinterpret_cast<T*>(scratch(0, (column1 - column0) * s.channels * int64_t(sizeof(T))));
    char *a = scratch(1, width / kTileColumns * a_panel), *b = scratch(2, s.taps[1] * copy);

    int64_t out_row = 0, in_row = 0;
    for (const Band& band : block) {
      for (int64_t p = band.p0; p < band.p1; ++p, ++out_row) {
        const T* from = dz + ((band.image * s.rows + p) * s.columns + band.q0) * s.filters + k0;
        kernels.pack_pixels(from, s.filters, pixels, width, a + out_row * row_bytes, a_panel);
      }
      const int64_t row0 = rows.least(band.p0), row1 = rows.most(band.p1 - 1) + 1;
      const int64_t group = ceil_div(row1 - row0, rows.mul);
      for (int64_t i = row0; i < row1; ++i) {
        const T* values = input_row(s, x, fill, band.image, i, column0, column1, line);
        const int64_t at = in_row + (i - row0) % rows.mul * group + (i - row0) / rows.mul;
        for (int64_t tap = 0; tap < s.taps[1]; ++tap) {
          kernels.pack_pixels(
              values + tap * columns.slope * s.channels, columns.mul * s.channels, pixels, s.channels,
              b + tap * copy + at * row_bytes, b_panel);
        }
      }
      in_row += group * rows.mul;
    }

    std::vector<Stretch> stretches(block.size());
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t r = tap / s.taps[1] * rows.slope;
        const char* plane = b + tap % s.taps[1] * copy + panel * b_panel;
        for (int64_t i = 0; i < width / kTileColumns * thirds.parts; ++i) {
          const int64_t third = i % thirds.parts, k = i / thirds.parts * kTileColumns + thirds.begin(third);
          const char* lane = a + i / thirds.parts * a_panel + thirds.begin(third) * 4;
          out_row = in_row = 0;
          for (size_t j = 0; j < block.size(); ++j) {
            const Band& band = block[j];
            const int64_t group = ceil_div(rows.most(band.p1 - 1) + 1 - rows.least(band.p0), rows.mul);
            const int64_t at = in_row + r % rows.mul * group + r / rows.mul;
            stretches[j] = {lane + out_row * row_bytes, plane + at * row_bytes,
                            (band.p1 - band.p0) * row_bytes / kPanelStep};
            out_row += band.p1 - band.p0;
            in_row += group * rows.mul;
          }
          kernels.add_tile(
              int(thirds.begin(third + 1) - thirds.begin(third)), stretches.data(), int64_t(block.size()), strides,
              add, dw + ((k0 + k) * taps + tap) * s.channels + panel * kTileColumns, taps * s.channels);
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

#define RESNET_FAST_ENGINE(T)                                                                                     \
  template bool engine_takes<T>(const ConvShape&);                                                                \
  template at::Tensor pack_filters<T>(const at::Tensor&, bool);                                                   \
  template void engine_fprop<T>(                                                                                  \
      const ConvShape&, const T*, const FillRow<T>&, const at::Tensor&, const float*, const T*, bool, T*,          \
      const Finish&);                                                                                             \
  template void engine_dgrad<T>(const ConvShape&, const T*, const FillRow<T>&, const at::Tensor&, T*, const Finish&); \
  template at::Tensor engine_wgrad<T>(const ConvShape&, const T*, const FillRow<T>&, const T*);

RESNET_FAST_ENGINE(float)
RESNET_FAST_ENGINE(bf16)

}  // namespace cpu
}  // namespace resnet_fast
