#include "tiled_conv.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "bands.h"
#include "conv_kernels.h"
#include "cpu_features.h"
#include "memory.h"
#include "winograd.h"

namespace resnet_fast {

template <class T>
const ConvKernels<T>* conv_kernels(int columns) {
#if RESNET_FAST_X86_64
  const Isa isa = active_isa();
  if constexpr (std::is_same_v<T, bf16>) {
#if RESNET_FAST_HAS_AMX
    if (isa >= Isa::AMX_BF16) return columns < kColumns ? nullptr : &amx_bf16::conv_kernels();
#endif
    if (isa >= Isa::AVX512_BF16) return &avx512_bf16::conv_kernels<bf16>(columns);
  }
  if (isa >= Isa::AVX512) return &avx512::conv_kernels<T>(columns);
  if (isa >= Isa::AVX2) return &avx2::conv_kernels<T>(columns);
#endif
  return nullptr;
}

template const ConvKernels<float>* conv_kernels(int);
template const ConvKernels<bf16>* conv_kernels(int);

namespace cpu {
namespace {

// Groups that are multiplied as one: the fewest adjacent ones whose channels and filters are multiples of a panel's
// columns, with zeros where a filter does not read a channel.
struct Block {
  int64_t groups, channels, filters;
};

// Panels have as many columns as divide the channels and filters of a group, where possible. AMX has no tiles for groups.
template <class T>
const ConvKernels<T>* kernels_for(const ConvShape& s) {
  const int64_t size = std::gcd(s.channels / s.groups, s.filters / s.groups);
  int columns = kColumns;
  while (s.groups > 1 && columns > 8 && size % columns != 0) columns /= 2;
  const auto* const kernels = conv_kernels<T>(columns);
  return s.groups > 1 && kernels != nullptr && kernels->steps > 1 ? nullptr : kernels;
}

template <class T>
Block block_of(const ConvShape& s) {
  const int64_t channels = s.channels / s.groups, filters = s.filters / s.groups, columns = kernels_for<T>(s)->columns;
  const auto groups = [&](int64_t size) { return columns / std::gcd(columns, size); };
  const int64_t n = s.groups == 1 ? 1 : std::lcm(groups(channels), groups(filters));
  return {n, n * channels, n * filters};
}

// Values of a row of taps that are multiplied as one tap, for pairs of bf16 with few channels; they are adjacent in the
// image. An odd number ends with a pair of the last two values, of which the first has a zero in the filter. 0: each tap
// is multiplied separately.
template <class T>
int64_t merged_values(const ConvKernels<T>& kernels, int64_t channels, int64_t column_taps) {
  return kernels.values > 1 && channels < kernels.columns ? channels * column_taps : 0;
}

template <class T>
struct Problem {
  const ConvKernels<T>& kernels;
  int64_t images, channels, filters;
  Block block;             // the panels of a block read its channels; there is one if fill provides x
  Axis rows, columns;
  const T* x;              // nullptr: fill provides x
  const FillRow<T>* fill;  // with x: completes x in place first
  const char* panels;
  const float *scale, *shift;
  const T* residual;
  bool relu;
  T* y;
  const Finish* finish;
};

// Adjacent blocks that a task multiplies.
struct Blocks {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// The zero-padded input of a band, in x itself or copied to scratch memory, as planes of some channels: row i, column j
// of the first plane is at base + (i − row0)·pitch + (j − column0)·pixel. A plane holds the channels of a block; with
// groups of steps (AMX), those of a group.
struct Input {
  const char* base;
  int64_t row0, column0, pitch, pixel, plane;
};

// The rows and columns of x that a band reads, including those outside of x, which are zeros.
struct Window {
  int64_t row0, row1, column0, column1;
  bool in_place;

  int64_t height() const { return row1 - row0; }
  int64_t width() const { return column1 - column0; }
};

// Whether the rows of a tile, `lda` bytes apart, share one set of the L1 cache, which holds fewer lines than rows.
template <class T>
bool rows_collide(const ConvKernels<T>& kernels, int64_t lda) {
  constexpr int64_t ways = 8, way_bytes = 4096;
  return kernels.steps == 1 && kernels.rows > ways && lda % way_bytes == 0;
}

template <class T>
Window window(const Problem<T>& c, const Band& band) {
  const Axis &rows = c.rows, &columns = c.columns;
  Window w = {rows.least(band.p0), rows.most(band.p1 - 1) + 1, columns.least(band.q0),
              columns.most(band.q1 - 1) + 1, false};
  const bool inside = w.row0 >= 0 && w.row1 <= rows.input && w.column0 >= 0 && w.column1 <= columns.input;
  const bool plain = !c.kernels.widens && c.block.groups == 1;
  const int64_t lda = columns.mul * c.channels * c.kernels.value_bytes();
  w.in_place = c.x != nullptr && inside && plain && !rows_collide(c.kernels, lda);  // else it must be copied
  return w;
}

// The values of a pixel in a plane.
template <class T>
int64_t plane_width(const Problem<T>& c) {
  return c.kernels.steps > 1 ? c.kernels.steps * c.kernels.values : c.block.channels;
}

// Bytes between the pixels of a copied band; merged ones are adjacent.
template <class T>
int64_t pixel_pitch(const Problem<T>& c) {
  const int64_t bytes = plane_width(c) * c.kernels.value_bytes();
  if (merged_values(c.kernels, c.block.channels, c.columns.taps)) return bytes;
  return bytes + (rows_collide(c.kernels, c.columns.mul * bytes) ? 64 : 0);
}

// Bytes between the planes of a copied band: an odd number of pixels, so that planes do not share cache sets.
template <class T>
int64_t plane_pitch(const Problem<T>& c, const Window& w) {
  return ((w.height() * w.width()) | 1) * pixel_pitch(c);
}

template <class T>
int64_t input_bytes(const Problem<T>& c, const Window& w, int64_t blocks) {
  return w.in_place ? 0 : blocks * c.block.channels / plane_width(c) * plane_pitch(c, w);
}

// Copies the input of some blocks of a band to `to`, of input_bytes, unless it is read in place. Clears `finite` if
// groups are multiplied as one and a value is not finite.
template <class T>
Input lay_out(const Problem<T>& c, const Band& band, const Blocks& blocks, const Window& w, char* to, bool& finite) {
  const ConvKernels<T>& kernels = c.kernels;
  const int64_t begin = std::max<int64_t>(0, w.column0), end = std::min(c.columns.input, w.column1);
  const int64_t channels = blocks.count() * c.block.channels, width = plane_width(c), planes = channels / width;
  const int64_t bytes = width * kernels.value_bytes(), pixel = pixel_pitch(c), pitch = plane_pitch(c, w);
  if (c.x && *c.fill) (*c.fill)(band.image, band.p0, band.q0, band.q1, nullptr);
  const int64_t image = band.image * c.rows.input * c.columns.input * c.channels;
  const T* const x = c.x ? c.x + image + blocks.begin * c.block.channels : nullptr;
  if (w.in_place) {
    const int64_t ld = c.channels * kernels.value_bytes();
    return {reinterpret_cast<const char*>(x), 0, 0, c.columns.input * ld, ld, bytes};
  }
  const auto clear = [&](char* at, int64_t pixels) {
    for (int64_t i = 0; pixels > 0 && i < planes; ++i) std::memset(at + i * pitch, 0, pixels * pixel);
  };
  for (int64_t i = w.row0; i < w.row1; ++i) {
    char* line = to + (i - w.row0) * w.width() * pixel;
    if (i < 0 || i >= c.rows.input || begin >= end) {
      clear(line, w.width());
      continue;
    }
    char* first = line + (begin - w.column0) * pixel;
    clear(line, begin - w.column0);
    clear(first + (end - begin) * pixel, w.column1 - end);
    const T* from = x ? x + (i * c.columns.input + begin) * c.channels : nullptr;
    if (!x) {
      const bool direct = planes == 1 && !kernels.widens && pixel == bytes;
      const int64_t size = (end - begin) * c.channels * int64_t(sizeof(T));
      T* filled = reinterpret_cast<T*>(direct ? first : scratch(1, size));
      (*c.fill)(band.image, i, begin, end, filled);
      if (direct) continue;
      from = filled;
    }
    finite &= kernels.copy(from, c.channels, end - begin, planes, width, first, pixel, pitch);
  }
  return {to, w.row0, w.column0, w.width() * pixel, pixel, pitch};
}

// One tile of a band: its pixels in the input and in y, and the phase that has its stretches.
struct Tile {
  const char* a;
  int64_t y, half_a, half_y;
  Rows rows;
  int phase;
};

// The stretches of a phase, and the end of each chain of them.
struct Phase {
  std::vector<Stretch> stretches;
  std::vector<int64_t> ends;

  Phase(std::vector<Stretch> all, int64_t most) : stretches(std::move(all)) {
    const int64_t n = int64_t(stretches.size());
    for (int64_t i = 0; i < n; ends.push_back(i)) i += chain(&stretches[i], n - i, most);
    if (n == 0) ends.push_back(0);  // no tap: zeros
  }
  int64_t begin(size_t chain) const { return chain == 0 ? 0 : ends[chain - 1]; }
};

// A band ready for multiplication. In the transpose of a strided convolution, all pixels whose row and column have
// the same remainders modulo the stride use the same taps: they form a phase, which has its tiles and stretches.
template <class T>
struct Ready {
  std::vector<Tile> tiles;
  std::vector<Phase> phases;
  int64_t lda, a_step, ldy, plane;
  bool in_place;
};

// Steps of a panel, over all taps.
template <class T>
int64_t panel_steps(const Problem<T>& c) {
  const int64_t merged = merged_values(c.kernels, c.block.channels, c.columns.taps);
  return c.rows.taps * (merged ? c.kernels.steps_of(merged) : c.columns.taps * c.kernels.steps_of(c.block.channels));
}

// The stretches of a phase whose first pixel is (p0, q0), relative to in.base: all taps of a few steps, then those of
// the next steps, so that the input they read stays in L1. If a row of taps reads adjacent values, it is one stretch.
template <class T>
std::vector<Stretch> stretches_of(const Problem<T>& c, const Input& in, int64_t a_step, int64_t p0, int64_t q0) {
  const Axis &rows = c.rows, &columns = c.columns;
  const ConvKernels<T>& kernels = c.kernels;
  const int64_t steps = kernels.steps_of(c.block.channels), most = kernels.depth;
  const bool joins = kernels.steps == 1 && columns.slope == 1 && columns.div == 1 && in.pixel == steps * a_step &&
                     columns.taps * steps <= most;
  const int64_t column_taps = joins ? 1 : columns.taps, depth = joins ? columns.taps * steps : steps;
  std::vector<Stretch> stretches;
  if (const int64_t merged = merged_values(kernels, c.block.channels, columns.taps)) {
    const int64_t pairs = merged / 2, step = kernels.panel_step(), row = kernels.steps_of(merged) * step;
    for (int64_t r = 0; r < rows.taps; ++r) {
      const int64_t at = (rows.at(p0, r) - in.row0) * in.pitch + (columns.at(q0, 0) - in.column0) * in.pixel;
      stretches.push_back({at, r * row, pairs});
      if (merged % 2 != 0) stretches.push_back({at + (merged - 2) * kernels.value_bytes(), r * row + pairs * step, 1});
    }
    return stretches;
  }
  for (int64_t i = 0; i < depth; i += most) {
    for (int64_t r = 0; r < rows.taps; ++r) {
      for (int64_t s = 0; s < column_taps && rows.meets(p0, r); ++s) {
        if (!columns.meets(q0, s)) continue;
        const int64_t at = (rows.at(p0, r) - in.row0) * in.pitch + (columns.at(q0, s) - in.column0) * in.pixel;
        const int64_t tap = (r * column_taps + s) * depth;
        stretches.push_back({at + i * a_step, (tap + i) * kernels.panel_step(), std::min(most, depth - i)});
      }
    }
  }
  return stretches;
}

// Cuts the rows of pixels into tiles: separate tiles for each row; two short rows in the halves of one tile; or, where
// x is copied in groups of steps and consecutive rows have the stride of pixels, runs of pixels across rows.
template <class T>
Ready<T> tiles_of(const Problem<T>& c, const Band& band, const Window& w, const Input& in) {
  const ConvKernels<T>& kernels = c.kernels;
  const Axis &rows = c.rows, &columns = c.columns;
  const int64_t y_row = columns.output * c.filters, ldy = columns.div * c.filters;
  const int64_t lda = columns.mul * in.pixel, line = rows.mul * in.pitch;
  const int full = kernels.rows, half = kernels.half;
  const int64_t a_step = kernels.steps > 1 ? in.plane / kernels.steps : 4;
  Ready<T> ready = {{}, {}, lda, a_step, ldy, in.plane, w.in_place};

  for (int64_t row_phase = 0; row_phase < rows.div; ++row_phase) {
    for (int64_t column_phase = 0; column_phase < columns.div; ++column_phase) {
      const int64_t p0 = band.p0 + row_phase, q0 = band.q0 + column_phase;
      const int64_t height = ceil_div(band.p1 - p0, rows.div), width = ceil_div(band.q1 - q0, columns.div);
      if (height <= 0 || width <= 0) continue;
      std::vector<Stretch> stretches = stretches_of(c, in, a_step, p0, q0);
      const int64_t origin = stretches.empty() ? 0 : stretches[0].a;
      for (Stretch& stretch : stretches) stretch.a -= origin;  // relative to a tile's first read
      const char* first = in.base + origin;
      const int64_t y0 = (band.image * rows.output + p0) * y_row + q0 * c.filters;
      const int phase = int(ready.phases.size());
      ready.phases.emplace_back(std::move(stretches), kernels.depth);

      const bool pairs = full > half && (width == half || (kernels.ragged && width < half));
      const Cut cut = {ceil_div(width, full), width};
      const int64_t positions = (height - 1) * w.width() + width;
      const bool runs = kernels.steps > 1 && !w.in_place && line == w.width() * lda && rows.div == 1 && columns.div == 1;
      if (runs && ceil_div(positions, full) <= (pairs ? ceil_div(height, 2) : height * cut.parts)) {
        for (int64_t at = 0; at < positions; at += full) {
          const int64_t p = at / w.width(), q = at % w.width();
          const int count = int(std::min<int64_t>(full, positions - at)), upper = std::min(count, half);
          // If the run begins between two rows, y is the start of the next row.
          const int64_t y = y0 + (q < width ? p * y_row + q * ldy : (p + 1) * y_row);
          const Rows tile = {upper, count - upper, int(q), int(width), int(w.width())};
          ready.tiles.push_back({first + at * lda, y, half * lda, 0, tile, phase});
        }
        continue;
      }
      const auto add = [&](int64_t p, int64_t q, const Rows& tile, int64_t half_a, int64_t half_y) {
        const int64_t y = y0 + p * rows.div * y_row + q * ldy;
        ready.tiles.push_back({first + p * line + q * lda, y, half_a, half_y, tile, phase});
      };
      for (int64_t p = 0; p < height; ++p) {
        if (pairs && p + 1 < height) {
          add(p, 0, {int(width), int(width)}, line, rows.div * y_row);
          ++p;
          continue;
        }
        for (int64_t i = 0, next; i < cut.parts; i = next) {
          const int size = int(cut.size(i)), upper = std::min(size, half);
          for (next = i + 1; next < std::min(cut.parts, i + kernels.tiles) && cut.size(next) == size;) ++next;
          add(p, cut.begin(i), {upper, size - upper, 0, 0, 0, int(next - i)}, half * lda, half * ldy);
        }
      }
    }
  }
  return ready;
}

// Maximum panels per tile of a pointwise convolution; and the space for bands that share a pass over filters that do
// not stay in L2, in addition to a panel.
constexpr int64_t kMostPanels = 8, kFarScratch = 5 << 18;

// Filters larger than this multiple of the input come from memory: every kernel reads them chain by chain.
constexpr int64_t kFarFilters = 4;

// Prefetches [from, to) to L2.
void fetch(const void* from, const void* to) {
  for (auto* line = static_cast<const char*>(from); line < to; line += 64) __builtin_prefetch(line, 0, 2);
}

template <class T>
int64_t filter_bytes(const Problem<T>& c) {
  return c.rows.taps * c.columns.taps * c.block.filters * c.block.channels * c.kernels.value_bytes();
}

// Bands that are multiplied together, ready for some blocks, in a thread's scratch memory.
template <class T>
struct Prepared {
  int64_t first = -1, block = -1;  // the first band and block
  std::vector<Ready<T>> bands;
  bool finite = true;

  void prepare(const Problem<T>& c, const std::vector<Band>& all, int64_t begin, int64_t end, const Blocks& blocks) {
    if (begin == first && blocks.begin == block) return;
    first = begin, block = blocks.begin;
    std::vector<Window> windows;
    int64_t bytes = 0;
    for (int64_t i = begin; i < end; ++i) {
      windows.push_back(window(c, all[i]));
      bytes += input_bytes(c, windows.back(), blocks.count());
    }
    char* to = bytes ? scratch(0, bytes) : nullptr;
    bands.clear();
    for (int64_t i = begin; i < end; ++i) {
      const Window& w = windows[i - begin];
      bands.push_back(tiles_of(c, all[i], w, lay_out(c, all[i], blocks, w, to, finite)));
      to += input_bytes(c, w, blocks.count());
    }
  }
};

// Multiplies prepared bands by panels [panel0, panel1) of one block.
template <class T>
void multiply(const Problem<T>& c, const Prepared<T>& prepared, int64_t panel0, int64_t panel1) {
  const ConvKernels<T>& kernels = c.kernels;
  const int64_t panel_bytes = panel_steps(c) * kernels.panel_step();
  const int64_t plane = panel0 * kernels.columns / c.block.filters - prepared.block;
  const std::vector<Ready<T>>& ready = prepared.bands;
  // A pointwise convolution reads x in place: what the next tile reads is prefetched during the current tile.
  const bool streams = ready[0].in_place && c.rows.output == 1 && c.columns.div == 1 && c.columns.mul == 1;

  Tiles state(kernels);
  const auto product = [&](const Ready<T>& band, const Tile& tile, int64_t panel, int64_t first, int64_t last) {
    const Stretch* stretches = band.phases[tile.phase].stretches.data();
    return Product{tile.a + plane * band.plane, c.panels + panel * panel_bytes, stretches + first, last - first,
                   band.lda, tile.half_a, band.a_step};
  };
  const auto store = [&](const Ready<T>& band, const Tile& tile, int64_t panel, const Product& product,
                         const float* partial) {
    const int64_t k = panel * kernels.columns;
    const Epilogue<T> epilogue = {partial, c.scale ? c.scale + k : nullptr, c.shift ? c.shift + k : nullptr,
                                  c.residual ? c.residual + tile.y + k : nullptr, c.relu};
    kernels.store_tile(tile.rows, product, c.y + tile.y + k, band.ldy, tile.half_y, epilogue, state.shape);
  };
  // Lets the product of the i-th of n tiles prefetch its share of a chain of a panel.
  const auto prefetch = [&](Product& product, const Tile& tile, int64_t panel, const Phase& phase, size_t chain,
                            size_t i, size_t n) {
    if (phase.stretches.empty()) return;
    const auto steps = [](const Stretch* begin, int64_t count) {
      int64_t sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += begin[j].steps;
      return sum;
    };
    const Stretch* const first = &phase.stretches[phase.begin(chain)];
    const Cut share = {int64_t(n), steps(first, phase.ends[chain] - phase.begin(chain)) * kernels.panel_step()};
    product.prefetch(c.panels + panel * panel_bytes + first->b + share.begin(i), share.size(i),
                     tile.rows.tiles * steps(product.stretches, product.count));
  };
  size_t chains = 1;
  int64_t tiles = 0;
  for (const Ready<T>& band : ready) {
    for (const Tile& tile : band.tiles) tiles += tile.rows.tiles;
    for (const Phase& phase : band.phases) chains = std::max(chains, phase.ends.size());
  }
  const int64_t input = c.images * c.rows.input * c.columns.input * c.block.channels * kernels.value_bytes();
  if (chains > 1 && (kernels.chained || (kernels.sum_tile && filter_bytes(c) > kFarFilters * input))) {
    // One chain of a panel stays in L1 for all tiles, while the next one is prefetched.
    const int64_t size = kernels.rows * kernels.columns;
    auto* const partials = reinterpret_cast<float*>(scratch(2, tiles * size * int64_t(sizeof(float))));
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      for (size_t i = 0; i < chains; ++i) {
        float* partial = partials;
        for (const Ready<T>& band : ready) {
          for (size_t j = 0; j < band.tiles.size(); ++j) {
            const Tile& tile = band.tiles[j];
            float* const sums = partial;
            partial += tile.rows.tiles * size;
            const Phase& phase = band.phases[tile.phase];
            if (i >= phase.ends.size()) continue;
            const bool first = i == 0, last = i + 1 == phase.ends.size();
            Product part = product(band, tile, panel, phase.begin(i), phase.ends[i]);
            if (!last) {
              prefetch(part, tile, panel, phase, i + 1, j, band.tiles.size());
            } else if (panel + 1 < panel1) {
              prefetch(part, tile, panel + 1, phase, 0, j, band.tiles.size());
            }
            if (last) {
              store(band, tile, panel, part, first ? nullptr : sums);
            } else {
              kernels.sum_tile(tile.rows, part, !first, sums, kernels.columns);
            }
          }
        }
      }
    }
    return;
  }
  // A tile of a pointwise convolution is multiplied by several panels in sequence, while it is in L1, and y is written
  // in longer runs; by one panel if the kernels are chained. With more taps, the window is too large for L1, and
  // writing y is a smaller part of the time.
  const bool pointwise = c.rows.taps * c.columns.taps == 1;
  const int64_t sequence = pointwise ? std::clamp<int64_t>(kernels.block_bytes / panel_bytes, 1, kMostPanels) : 1;
  for (int64_t first = panel0; first < panel1; first += sequence) {
    const int64_t last = std::min(first + sequence, panel1);
    for (const Ready<T>& band : ready) {
      for (size_t i = 0; i < band.tiles.size(); ++i) {
        const Tile& tile = band.tiles[i];
        const Phase& phase = band.phases[tile.phase];
        // The pixels after the tile, also those of another band, as rows of it.
        const int64_t rows = int64_t(tile.rows.first + tile.rows.second) * tile.rows.tiles;
        const int64_t left = streams ? c.columns.output - tile.y / c.filters - rows : 0;
        const Cut shares = {last - first, std::min(rows, left)};
        for (int64_t panel = first; panel < last; ++panel) {
          Product whole = product(band, tile, panel, 0, int64_t(phase.stretches.size()));
          if (sequence == 1 && chains == 1 && panel + 1 < panel1) {
            prefetch(whole, tile, panel + 1, phase, 0, i, band.tiles.size());
          }
          const int64_t row0 = rows + shares.begin(panel - first), row1 = rows + shares.begin(panel - first + 1);
          if (const char* const from = tile.a + row0 * band.lda; row0 < row1 && first == panel0) {
            const int64_t bytes = (row1 - row0) * band.lda;
            if (whole.ahead == nullptr) {
              whole.prefetch(from, bytes, tile.rows.tiles * kernels.steps_of(c.channels));
            } else {
              fetch(from, from + bytes);
            }
          }
          for (int64_t row = row0; c.residual && row < row1; ++row) {
            const T* at = c.residual + tile.y + row * band.ldy;
            fetch(at + first * kernels.columns, at + last * kernels.columns);
          }
          store(band, tile, panel, whole, nullptr);
        }
      }
    }
  }
}

// Bands of about scratch_bytes of input for so many blocks: whole rows of an image, or runs of columns if the image is
// one row; a multiple of `threads` of equal size where possible.
template <class T>
std::vector<Band> cut(const Problem<T>& c, int64_t threads, int64_t blocks) {
  const Axis &rows = c.rows, &columns = c.columns;
  const int64_t scratch_bytes = c.kernels.scratch_bytes, tile_rows = c.kernels.rows;
  std::vector<Band> bands;
  const int64_t pixel = blocks * c.block.channels * c.kernels.value_bytes(), row_bytes = columns.input * pixel;
  if (rows.output == 1 && columns.div == 1 && columns.taps == 1) {
    const int64_t fits = std::max<int64_t>(2 * tile_rows, scratch_bytes / pixel);
    const int64_t most = std::min<int64_t>(fits, std::max<int64_t>(16 * tile_rows, 96));
    const int64_t parts = ceil_div(ceil_div(columns.output, most), threads) * threads;  // equal per thread
    const int64_t size = ceil_div(ceil_div(columns.output, parts), tile_rows) * tile_rows;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t q = 0; q < columns.output; q += size) {
        bands.push_back({n, 0, 1, q, std::min(columns.output, q + size)});
      }
    }
    return bands;
  }
  const int64_t in_rows = std::max<int64_t>(1, scratch_bytes / row_bytes - (rows.taps - 1) / rows.div);
  const int64_t most = std::clamp<int64_t>(in_rows * rows.div / rows.mul, 1, rows.output);
  const int64_t least = ceil_div(threads, c.images);  // at least one band per thread
  const int64_t parts = std::max(ceil_div(rows.output, most), std::min(least, rows.output));
  const int64_t size = ceil_div(rows.output, parts);
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t p = 0; p < rows.output; p += size) {
      bands.push_back({n, p, std::min(rows.output, p + size), 0, columns.output});
    }
  }
  return bands;
}

// The number of bands that share a pass over the panels, balanced over the threads. It is larger if the panels do not
// fit L2, because each pass then reads them from L3 or memory.
template <class T>
int64_t bands_together(const Problem<T>& c, const std::vector<Band>& bands, int64_t threads, int64_t blocks) {
  const int64_t count = int64_t(bands.size());
  const int64_t bytes = input_bytes(c, window(c, bands[0]), blocks);
  const int64_t room = filter_bytes(c) > kFarBytes ? kFarScratch : c.kernels.scratch_bytes;
  const int64_t fits = std::max<int64_t>(1, bytes ? room / bytes : 1);
  return ceil_div(count, ceil_div(ceil_div(count, fits), threads) * threads);
}

// Bytes of a pixel that a task copies at least; shorter runs are copied slowly.
constexpr int64_t kRunBytes = 256;

// Runs all bands and blocks. Where no step needs whole bands, few bands (a small batch) are also split by blocks and
// filters; and only by them if there are several blocks, or filters that do not stay in L2, so that each is read by one
// thread. Returns false if groups are multiplied as one and a value that is read is not finite; y then has no meaning.
template <class T>
bool run(const Problem<T>& c) {
  const bool completes = c.x != nullptr && *c.fill;  // fill writes x: one task per band
  const bool splits = !*c.finish && !completes;
  const int64_t blocks = c.filters / c.block.filters, panels = c.block.filters / c.kernels.columns;
  const int64_t block_bytes = c.block.channels * c.kernels.value_bytes(), threads = at::get_num_threads();
  const int64_t share = splits && (blocks > 1 || filter_bytes(c) > kFarBytes) ? 1 : threads;
  // A task takes a run of blocks: all, or fewer if their filters do not stay in L2, or there are few tasks.
  int64_t size = blocks;
  std::vector<Band> bands = cut(c, share, size);
  while (splits && size > 1 && size * block_bytes > kRunBytes &&
         (size * filter_bytes(c) > kFarBytes ||
          int64_t(bands.size()) * ceil_div(blocks, size) < 2 * threads)) {
    size = ceil_div(size, 2);
    bands = cut(c, share, size);
  }
  const Cut runs = {ceil_div(blocks, size), blocks};
  const int64_t together = bands_together(c, bands, share, size);
  const int64_t count = ceil_div(int64_t(bands.size()), together);
  std::atomic<bool> finite{true};
  // Parts of the panels of the bands of `i` and of a run of blocks.
  const auto run_some = [&](Prepared<T>& prepared, int64_t i, int64_t run, const Cut& parts, int64_t part) {
    const int64_t first = i * together, last = std::min(first + together, int64_t(bands.size()));
    const Blocks some = {runs.begin(run), runs.begin(run + 1)};
    prepared.prepare(c, bands, first, last, some);
    if (!prepared.finite) finite = false;
    for (int64_t block = some.begin; finite && block < some.end; ++block) {
      multiply(c, prepared, block * panels + parts.begin(part), block * panels + parts.begin(part + 1));
    }
  };
  if (splits) {
    // The last group of bands of each thread is split by panels, so that the threads end at about the same time. The
    // tasks of an owner are those that for_tasks_with gives to one thread.
    const int64_t groups = count * runs.parts;
    const Cut owners = {std::min(groups, threads), groups}, all = {1, panels};
    const Cut parts = {std::clamp<int64_t>(ceil_div(4 * threads, owners.parts), 1, panels), panels};
    const auto begin = [&](int64_t owner) { return owners.begin(owner) + owner * (parts.parts - 1); };  // its first task
    for_tasks_with<Prepared<T>>(begin(owners.parts), [&](Prepared<T>& prepared, int64_t task) {
      int64_t owner = 0;
      while (task >= begin(owner + 1)) ++owner;
      const int64_t i = owners.begin(owner) + task - begin(owner), last = owners.begin(owner + 1) - 1;
      const int64_t group = std::min(i, last);
      run_some(prepared, group / runs.parts, group % runs.parts, i < last ? all : parts, std::max<int64_t>(0, i - last));
    });
    return finite;
  }
  const int64_t tasks = std::min(count, kTasks);
  for_tasks(tasks, [&](int64_t task) {
    for (int64_t i = task * count / tasks; i < (task + 1) * count / tasks; ++i) {
      Prepared<T> prepared;
      run_some(prepared, i, 0, {1, panels}, 0);  // a run of all blocks
      if (!*c.finish || !finite) continue;
      for (int64_t j = i * together; j < std::min((i + 1) * together, int64_t(bands.size())); ++j) {
        const Band& band = bands[j];
        const int64_t row = (band.image * c.rows.output + band.p0) * c.columns.output;
        const int64_t pixels = (band.p1 - band.p0) * (band.q1 - band.q0);
        (*c.finish)(task, row + band.q0, row + band.q0 + pixels);
      }
    }
  });
  return finite;
}

}  // namespace

template <class T>
bool tiled_conv_takes(const ConvShape& s) {
  const ConvKernels<T>* const kernels = kernels_for<T>(s);
  if (kernels == nullptr) return false;
  const Block block = block_of<T>(s);
  return block.channels % kernels->columns == 0 && block.filters % kernels->columns == 0 &&
         s.groups % block.groups == 0 && block.groups <= kMostGroups &&
         s.channels * s.filters * s.images * s.rows * s.columns > 0;
}

template <class T>
bool tiled_conv_needs_finite(const ConvShape& s) {
  return s.groups > 1 ? block_of<T>(s).groups > 1 : by_winograd<T>(s, false) == 4;
}

template <class T>
bool tiled_fprop_merges(const ConvShape& s) {
  const ConvKernels<T>* const kernels = conv_kernels<T>();
  return kernels != nullptr && kernels->steps == 1 && s.groups == 1 && s.channels < kColumns && s.taps[1] > 1 &&
         s.channels * s.taps[1] <= kChain && s.dilation[1] == 1 && s.filters % kColumns == 0 &&
         s.channels * s.filters * s.images * s.rows * s.columns > 0;
}

template <class T>
int by_winograd(const ConvShape& s, bool dgrad) {
  return winograd_tile<T>(dgrad ? transposed(s) : s);
}

// Filters [K,n·C,R,S] of w [K,C,R,S], where n groups are a block: zeros for the channels of the other groups.
at::Tensor whole_blocks(const at::Tensor& w, int64_t groups, int64_t n) {
  if (n == 1) return w;
  const int64_t blocks = groups / n, filters = w.size(0) / groups;
  const at::Tensor dense = at::zeros({blocks, n, filters, n, w.size(1), w.size(2), w.size(3)}, w.options());
  const at::Tensor parts = w.reshape({blocks, n, filters, w.size(1), w.size(2), w.size(3)});
  dense.diagonal(0, 1, 3).copy_(parts.permute({0, 2, 3, 4, 5, 1}));
  return dense.view({w.size(0), n * w.size(1), w.size(2), w.size(3)});
}

// Filters as the panels of the direct tiles.
template <class T>
at::Tensor pack_panels(const ConvShape& shape, const at::Tensor& w, bool for_dgrad, Allocate allocate) {
  const ConvKernels<T>& kernels = *kernels_for<T>(shape);
  const Block block = block_of<T>(shape);
  const at::Tensor dense = whole_blocks(kernels.widens ? w.to(at::kFloat) : w, shape.groups, block.groups);
  // [K][R·S][C]
  at::Tensor rows = dense.contiguous(at::MemoryFormat::ChannelsLast).permute({0, 2, 3, 1}).flatten(1, 2);
  if (const int64_t merged = merged_values(kernels, dense.size(1), shape.taps[1])) {  // [K][R][S·C]
    rows = rows.reshape({shape.filters, shape.taps[0], merged});
    const at::Tensor last = rows.narrow(2, merged - 1, 1);
    if (merged % 2 != 0) rows = at::cat({rows.narrow(2, 0, merged - 1), at::zeros_like(last), last}, 2);
  }
  const bool is_float = rows.scalar_type() == at::kFloat;
  const int64_t channels = rows.size(2), taps = rows.size(1), ld = taps * channels;
  const int64_t outer = for_dgrad ? shape.channels : shape.filters, inner = for_dgrad ? block.filters : channels;
  const int64_t width = kernels.columns, tap_bytes = kernels.steps_of(inner) * kernels.panel_step();
  const int64_t bytes = outer / width * taps * tap_bytes + 64;
  const at::Tensor packed = allocate(bytes);
  char* to = reinterpret_cast<char*>(packed.data_ptr<uint8_t>());
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  const int64_t size = rows.element_size();
  at::parallel_for(0, outer / width * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / taps, tap = i % taps;
      if (for_dgrad) {  // outer are channels: those of a block in each of its filters
        const int64_t first = panel * width / channels * block.filters * ld + panel * width % channels;
        kernels.pack_inner(from + (first + tap * channels) * size, is_float, ld, inner, to + i * tap_bytes);
      } else {
        const int64_t first = panel * width * ld;
        kernels.pack_outer(from + (first + tap * channels) * size, is_float, ld, inner, to + i * tap_bytes);
      }
    }
  });
  return packed;
}

template <class T>
at::Tensor pack_filters(const ConvShape& shape, const at::Tensor& w, bool for_dgrad, Allocate allocate) {
  const ConvShape s = for_dgrad ? transposed(shape) : shape;
  if (!winograd_keeps<T>(s)) return pack_panels<T>(shape, w, for_dgrad, allocate);
  return winograd_filters<T>(s, pack_panels<T>(shape, w, for_dgrad, &empty_bytes), for_dgrad, allocate);
}

template <class T>
bool tiled_conv_fprop(
    const ConvShape& shape, const T* x, const FillRow<T>& fill, const at::Tensor& panels, const float* scale,
    const float* shift, const T* residual, bool relu, T* y, const Finish& finish) {
  if (by_winograd<T>(shape, false)) {
    return winograd(shape, x, fill, panels, false, scale, shift, residual, relu, y, finish);
  }
  const ConvShape s = flattened(shape);
  const Problem<T> c = {
      *kernels_for<T>(s), s.images, s.channels, s.filters, block_of<T>(s),
      fprop_axis(s.height, s.rows, s, 0), fprop_axis(s.width, s.columns, s, 1),
      x, &fill, reinterpret_cast<const char*>(panels.const_data_ptr<uint8_t>()), scale, shift, residual, relu, y,
      &finish};
  return run(c);
}

template <class T>
bool tiled_conv_dgrad(
    const ConvShape& shape, const T* dz, const FillRow<T>& fill, const at::Tensor& panels, T* dx,
    const Finish& finish) {
  if (by_winograd<T>(shape, true)) {
    return winograd<T>(transposed(shape), dz, fill, panels, true, nullptr, nullptr, nullptr, false, dx, finish);
  }
  const ConvShape s = flattened(shape);
  const Block block = block_of<T>(s);
  const Problem<T> c = {
      *kernels_for<T>(s), s.images, s.filters, s.channels, {block.groups, block.filters, block.channels},
      dgrad_axis(s.rows, s.height, s, 0), dgrad_axis(s.columns, s.width, s, 1),
      dz, &fill, reinterpret_cast<const char*>(panels.const_data_ptr<uint8_t>()), nullptr, nullptr,
      nullptr, false, dx, &finish};
  return run(c);
}

#define RESNET_FAST_TILED_CONV(T)                                                                                   \
  template bool tiled_conv_takes<T>(const ConvShape&);                                                              \
  template bool tiled_conv_needs_finite<T>(const ConvShape&);                                                       \
  template bool tiled_fprop_merges<T>(const ConvShape&);                                                            \
  template int by_winograd<T>(const ConvShape&, bool);                                                              \
  template at::Tensor pack_filters<T>(const ConvShape&, const at::Tensor&, bool, Allocate);                         \
  template bool tiled_conv_fprop<T>(                                                                                \
      const ConvShape&, const T*, const FillRow<T>&, const at::Tensor&, const float*, const float*, const T*, bool, \
      T*, const Finish&);                                                                                           \
  template bool tiled_conv_dgrad<T>(                                                                                \
      const ConvShape&, const T*, const FillRow<T>&, const at::Tensor&, T*, const Finish&);

RESNET_FAST_TILED_CONV(float)
RESNET_FAST_TILED_CONV(bf16)

}  // namespace cpu
}  // namespace resnet_fast
