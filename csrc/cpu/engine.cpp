#include "engine.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "conv_kernels.h"
#include "cpu_features.h"

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

template <class T>
void run_band(const Problem<T>& c, const Band& band) {
  const ConvKernels<T>& kernels = *conv_kernels<T>();
  const Input<T> in = lay_out(c, band);
  const Axis &rows = c.rows, &columns = c.columns;
  const int64_t depth = steps<T>(c.channels), tap_bytes = depth * kPanelStep;
  const int64_t panel_bytes = rows.taps * columns.taps * tap_bytes;
  const TileStrides strides = {columns.mul * c.channels * int64_t(sizeof(T)), 4, kPanelStep};
  std::vector<Stretch> stretches(rows.taps * columns.taps);
  for (int64_t panel = 0; panel < c.filters / kTileColumns; ++panel) {
    const char* b = c.panels + panel * panel_bytes;
    for (int64_t p = band.p0; p < band.p1; ++p) {
      for (int64_t phase = 0; phase < columns.div; ++phase) {
        const int64_t q0 = band.q0 + phase, count = ceil_div(band.q1 - q0, columns.div);
        if (count <= 0) continue;
        const int64_t tiles = ceil_div(count, kTileRows);
        int64_t done = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t size = (count - done) / (tiles - tile) + ((count - done) % (tiles - tile) != 0);
          int64_t n = 0;
          for (int64_t r = 0; r < rows.taps; ++r) {
            if (!rows.meets(p, r)) continue;
            const T* line = in.base + (rows.at(p, r) - in.row0) * in.pitch;
            for (int64_t s = 0; s < columns.taps; ++s) {
              if (!columns.meets(q0, s)) continue;
              const int64_t column = columns.at(q0, s) - in.column0 + done * columns.mul;
              stretches[n++] = {reinterpret_cast<const char*>(line + column * c.channels),
                                b + (r * columns.taps + s) * tap_bytes, depth};
            }
          }
          const int64_t q = q0 + done * columns.div;
          const int64_t at = ((band.image * rows.output + p) * columns.output + q) * c.filters + panel * kTileColumns;
          const Epilogue<T> epilogue = {c.shift ? c.shift + panel * kTileColumns : nullptr,
                                        c.residual ? c.residual + at : nullptr, c.relu};
          kernels.store_tile(int(size), stretches.data(), n, strides, c.y + at, columns.div * c.filters, epilogue);
          done += size;
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
    const int64_t most = std::max<int64_t>(2 * kTileRows, kScratchBytes / (c.channels * int64_t(sizeof(T))));
    const int64_t size = std::min<int64_t>(most, 16 * kTileRows) / kTileRows * kTileRows;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t q = 0; q < columns.output; q += size) {
        bands.push_back({n, 0, 1, q, std::min(columns.output, q + size)});
      }
    }
    return bands;
  }
  const int64_t in_rows = std::max<int64_t>(1, kScratchBytes / row_bytes - (rows.taps - 1) / rows.div);
  const int64_t most = std::clamp<int64_t>(in_rows * rows.div / rows.mul, 1, rows.output);
  const int64_t parts = ceil_div(rows.output, most), size = ceil_div(rows.output, parts);
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t p = 0; p < rows.output; p += size) {
      bands.push_back({n, p, std::min(rows.output, p + size), 0, columns.output});
    }
  }
  return bands;
}

template <class T>
void run(const Problem<T>& c) {
  const std::vector<Band> bands = cut(c);
  const int64_t count = int64_t(bands.size()), tasks = std::min(count, kTasks);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t i = task * count / tasks; i < (task + 1) * count / tasks; ++i) {
        const Band& band = bands[i];
        run_band(c, band);
        if (*c.finish) {
          const int64_t row = (band.image * c.rows.output + band.p0) * c.columns.output;
          const int64_t pixels = (band.p1 - band.p0) * (band.q1 - band.q0);
          (*c.finish)(task, row + band.q0, row + band.q0 + pixels);
        }
      }
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

// A row of channels cut into tiles of equal widths, give or take one.
struct Tiles {
  int64_t count, total;
  int64_t begin(int64_t i) const { return i * total / count; }
};

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

// For blocks of pixels that fit L2 beside each other: dz as [tile of filters][step][16 lanes], x as
// [column tap][32 channels][row][step][32 lanes], then every tile dw[14 filters][tap][32 channels] += dzᵀ·x.
// fp32 steps are pixels, so that one copy of x serves all column taps; bf16 steps are pairs of pixels.
// Tasks are chunks of filters times lanes of blocks; lanes have sums of their own, added in order.
template <class T>
at::Tensor engine_wgrad(const ConvShape& shape, const T* x, const FillRow<T>& fill, const T* dz) {
  const ConvShape s = flattened(shape);
  const ConvKernels<T>& kernels = *conv_kernels<T>();
  const Axis rows = fprop_axis(s.height, s.rows, s, 0), columns = fprop_axis(s.width, s.columns, s, 1);
  const int64_t taps = s.tap_count(), chunk = std::min<int64_t>(s.filters, 512);
  const int64_t chunks = ceil_div(s.filters, chunk), copies = kStepValues<T> == 1 ? 1 : s.taps[1];
  const int64_t panels = s.channels / kTileColumns;

  // A block: runs of columns of a single-row image, or whole rows, possibly of several images.
  const bool flat = s.rows == 1 && s.taps[0] == 1 && s.taps[1] == 1;
  const int64_t pixel_bytes = (chunk + s.channels * copies) * int64_t(sizeof(T));
  const int64_t most = std::clamp<int64_t>((640 << 10) / pixel_bytes, 96, 256) / 2 * 2;
  std::vector<std::vector<Band>> blocks;
  if (flat) {
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t q = 0; q < s.columns; q += most) blocks.push_back({{n, 0, 1, q, std::min(s.columns, q + most)}});
    }
  } else {
    const int64_t a_block = std::max<int64_t>(1, most / s.columns);
    const int64_t part = a_block >= s.rows ? s.rows : ceil_div(s.rows, ceil_div(s.rows, a_block));
    int64_t room = 0;
    for (int64_t n = 0; n < s.images; ++n) {
      for (int64_t p = 0; p < s.rows; p += part) {
        const Band band = {n, p, std::min(s.rows, p + part), 0, s.columns};
        if (room < band.p1 - band.p0) {
          blocks.emplace_back();
          room = std::max(a_block, band.p1 - band.p0);
        }
        blocks.back().push_back(band);
        room -= band.p1 - band.p0;
      }
    }
  }
  const int64_t count = int64_t(blocks.size());
  const int64_t lanes = std::clamp<int64_t>(ceil_div(at::get_num_threads(), chunks), 1, count);
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const int64_t size = s.filters * taps * s.channels;
  const at::Tensor sums = at::zeros({lanes, size}, options);

  const auto run_task = [&](int64_t task) {
    const int64_t lane = task / chunks, k0 = task % chunks * chunk, width = std::min(chunk, s.filters - k0);
    const Tiles tiles = {ceil_div(width, kTileRows), width};
    float* dw = sums.data_ptr<float>() + lane * size;
    std::vector<Stretch> stretches;
    for (int64_t block = lane * count / lanes; block < (lane + 1) * count / lanes; ++block) {
      int64_t line_steps = 0, in_rows = 0, in_width = 0;
      for (const Band& band : blocks[block]) {
        line_steps += (band.p1 - band.p0) * steps<T>(band.q1 - band.q0);
        in_rows += rows.most(band.p1 - 1) + 1 - rows.least(band.p0);
        in_width = std::max(in_width, columns.most(band.q1 - 1) + 1 - columns.least(band.q0));
      }
      const int64_t row_steps = copies == 1 && kStepValues<T> == 1 ? in_width : steps<T>(blocks[block][0].q1 - blocks[block][0].q0);
      const int64_t row_bytes = row_steps * kPanelStep, copy_bytes = panels * in_rows * row_bytes;
      char* line = scratch(0, in_width * s.channels * int64_t(sizeof(T)) + 64);
      char* a = scratch(1, tiles.count * line_steps * kLineLanes * 4);
      char* b = scratch(2, copies * copy_bytes);

      int64_t line_at = 0, row_at = 0;
      std::vector<std::pair<int64_t, int64_t>> starts;  // (step of dz, row of x) of each output row
      for (const Band& band : blocks[block]) {
        const int64_t row0 = rows.least(band.p0), row1 = rows.most(band.p1 - 1) + 1;
        const int64_t column0 = columns.least(band.q0), column1 = columns.most(band.q1 - 1) + 1;
        for (int64_t p = band.p0; p < band.p1; ++p) {
          const T* from = dz + (((band.image * s.rows + p) * s.columns) + band.q0) * s.filters + k0;
          kernels.pack_pixels(
              from, s.filters, band.q1 - band.q0, width, tiles.count, kLineLanes, a + line_at * kLineLanes * 4,
              line_steps * kLineLanes * 4);
          starts.emplace_back(line_at, row_at + rows.at(p, 0) - row0);
          line_at += steps<T>(band.q1 - band.q0);
        }
        for (int64_t i = row0; i < row1; ++i, ++row_at) {
          const int64_t begin = std::max<int64_t>(0, column0), end = std::min(columns.input, column1);
          const bool outside = i < 0 || i >= s.height || begin >= end;
          const T* values = reinterpret_cast<const T*>(line);
          if (x != nullptr && !outside && begin == column0 && end == column1) {
            values = x + ((band.image * s.height + i) * s.width + begin) * s.channels;
          } else {
            T* to = reinterpret_cast<T*>(line);
            const int64_t row_values = (column1 - column0) * s.channels;
            const int64_t first = outside ? row_values : (begin - column0) * s.channels;
            const int64_t last = outside ? row_values : (end - column0) * s.channels;
            std::memset(static_cast<void*>(to), 0, first * sizeof(T));
            std::memset(static_cast<void*>(to + last), 0, (row_values - last) * sizeof(T));
            if (!outside && x != nullptr) {
              const T* from = x + ((band.image * s.height + i) * s.width + begin) * s.channels;
              std::memcpy(static_cast<void*>(to + first), from, (last - first) * sizeof(T));
            } else if (!outside) {
              fill(band.image, i, begin, end, to + first);
            }
          }
          for (int64_t copy = 0; copy < copies; ++copy) {
            const bool paired = kStepValues<T> > 1;
            const int64_t pixels = paired ? band.q1 - band.q0 : column1 - column0;
            const int64_t stride = paired ? columns.mul : 1, from = paired ? copy * columns.slope : 0;
            kernels.pack_pixels(
                values + from * s.channels, stride * s.channels, pixels, s.channels, panels, kTileColumns,
                b + copy * copy_bytes + row_at * row_bytes, in_rows * row_bytes);
          }
        }
      }

      const int64_t lines = int64_t(starts.size());
      stretches.resize(lines);
      const TileStrides strides = {4, kLineLanes * 4, kStepValues<T> == 1 ? columns.mul * kPanelStep : kPanelStep};
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t r = tap / s.taps[1], column_tap = tap % s.taps[1];
          const char* plane = b + (copies > 1 ? column_tap : 0) * copy_bytes + panel * in_rows * row_bytes +
                              (copies > 1 || kStepValues<T> > 1 ? 0 : column_tap * columns.slope * kPanelStep);
          for (int64_t i = 0; i < tiles.count; ++i) {
            for (int64_t j = 0; j < lines; ++j) {
              const int64_t next = j + 1 < lines ? starts[j + 1].first : line_steps;
              stretches[j] = {a + (i * line_steps + starts[j].first) * kLineLanes * 4,
                              plane + (starts[j].second + r * rows.slope) * row_bytes, next - starts[j].first};
            }
            kernels.add_tile(
                int(tiles.begin(i + 1) - tiles.begin(i)), stretches.data(), lines, strides,
                dw + ((k0 + tiles.begin(i)) * taps + tap) * s.channels + panel * kTileColumns, taps * s.channels);
          }
        }
      }
    }
  };
  at::parallel_for(0, lanes * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run_task(task);
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
