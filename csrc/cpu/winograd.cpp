#include "winograd.h"

#include <algorithm>
#include <vector>

#include "bands.h"
#include "conv_kernels.h"
#include "cpu_features.h"
#include "memory.h"

namespace resnet_fast::cpu {
namespace {

// nullptr if this CPU has no tiles of T in fp32 arithmetic.
template <class T>
const WinogradKernels<T>* kernels() {
#if RESNET_FAST_X86_64
  const ConvKernels<T>* const tiles = conv_kernels<T>();
  if (tiles == nullptr || tiles->values > 1) return nullptr;
  return active_isa() >= Isa::AVX512 ? &avx512::winograd_kernels<T>() : &avx2::winograd_kernels<T>();
#else
  return nullptr;
#endif
}

// Tiles of 2x2 outputs: rows and columns per image, and rows over all images.
struct Grid {
  int64_t rows, columns, all;

  explicit Grid(const ConvShape& s) {
    rows = ceil_div(s.rows, 2), columns = ceil_div(s.columns, 2), all = s.images * rows;
  }
};

// Tiles per block; a block is transformed, multiplied and transformed back as a whole. It is large enough that the
// filters, which each block reads, are a small part of its traffic, and small enough that with few filters its products
// stay in L2 (measured: the fastest of 56 to 336).
constexpr int64_t kBlockTiles = 112;

// Tiles per thread from which fewer products outweigh larger filters (measured).
int64_t least_tiles() { return active_isa() >= Isa::AVX512 ? 12 : 8; }

// Rows of tiles of one image in a block; `tile` is the first one's index in the block. They give rows [p0, p1) of y
// from rows [h0, h1) of x and zeros.
struct Segment {
  int64_t image, tile, rows, p0, p1, h0, h1;
};

std::vector<Segment> segments(const ConvShape& s, const Grid& grid, int64_t first, int64_t last) {
  std::vector<Segment> all;
  for (int64_t row = first; row < last;) {
    const int64_t image = row / grid.rows, in_image = row % grid.rows;
    const int64_t rows = std::min(last - row, grid.rows - in_image), p0 = 2 * in_image, p1 = p0 + 2 * rows;
    all.push_back({image, (row - first) * grid.columns, rows, p0, std::min(p1, s.rows),
                   std::max<int64_t>(0, p0 - s.padding[0]), std::min(s.height, p1 + 2 - s.padding[0])});
    row += rows;
  }
  return all;
}

// Values between the matrices of products, which have rows of `width` values: an odd multiple of 16, so that the
// matrices do not share cache sets.
int64_t pitch_of(int64_t tiles, int64_t width) { return (tiles * width / 16 | 1) * 16; }

// The values of pixels outside an image.
template <class T>
const T* zeros() {
  static const std::vector<T> values(kMostWinogradChannels, T{});
  return values.data();
}

// f(tile, its patch) for the tiles of a segment; with a prologue, it first writes the rows of x to scratch memory.
template <class T, class F>
void each_patch(const ConvShape& s, const Grid& grid, const Segment& g, const T* x, const FillRow<T>& fill, F f) {
  const int64_t line = s.width * s.channels;
  const T* lines;  // the first row that is read
  if (x != nullptr) {
    lines = x + (g.image * s.height + g.h0) * line;
  } else {
    auto* filled = reinterpret_cast<T*>(scratch(2, (g.h1 - g.h0) * line * int64_t(sizeof(T))));
    for (int64_t h = g.h0; h < g.h1; ++h) fill(g.image, h, 0, s.width, filled + (h - g.h0) * line);
    lines = filled;
  }
  const T* rows[4];
  const T* d[16];
  int64_t tile = g.tile;
  for (int64_t p = g.p0; p < g.p0 + 2 * g.rows; p += 2) {
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t h = p - s.padding[0] + i;
      rows[i] = h >= g.h0 && h < g.h1 ? lines + (h - g.h0) * line : nullptr;
    }
    for (int64_t q = 0; q < 2 * grid.columns; q += 2) {
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t w = q - s.padding[1] + i % 4;
        d[i] = rows[i / 4] && w >= 0 && w < s.width ? rows[i / 4] + w * s.channels : zeros<T>();
      }
      f(tile++, d);
    }
  }
}

// f(tile, indices of its four pixels in y) for the tiles of a segment; the index of a pixel outside is -1.
template <class F>
void each_output(const ConvShape& s, const Segment& g, F f) {
  int64_t tile = g.tile;
  for (int64_t p = g.p0; p < g.p1; p += 2) {
    for (int64_t q = 0; q < s.columns; q += 2) {
      int64_t at[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t row = p + i / 2, column = q + i % 2;
        at[i] = row < s.rows && column < s.columns ? ((g.image * s.rows + row) * s.columns + column) * s.filters : -1;
      }
      f(tile++, at);
    }
  }
}

std::vector<Stretch> stretches_of(int64_t steps, int64_t a_step) {
  const ConvKernels<float>& kernels = *conv_kernels<float>();
  std::vector<Stretch> stretches;
  for (int64_t i = 0; i < steps; i += kernels.depth) {
    stretches.push_back({i * a_step, i * kPanelStep, std::min(kernels.depth, steps - i)});
  }
  return stretches;
}

// M = V·U for panels [begin, end) of all 16 products' filters.
void multiply(
    const ConvShape& s, int64_t tiles, const float* v, int64_t v_pitch, const char* filters, float* m,
    int64_t m_pitch, int64_t begin, int64_t end) {
  const ConvKernels<float>& kernels = *conv_kernels<float>();
  const int64_t lda = s.channels * int64_t(sizeof(float)), panels = s.filters / kColumns;
  const std::vector<Stretch> stretches = stretches_of(s.channels, sizeof(float));
  const auto parts = int64_t(stretches.size());
  const auto filters_at = [&](int64_t n) { return filters + n / parts * s.channels * kPanelStep + stretches[n % parts].b; };
  for (int64_t n = begin * parts; n < end * parts; ++n) {
    const int64_t j = n / parts, part = n % parts, i = j / panels, k = j % panels * kColumns;
    const char* const panel = filters + j * s.channels * kPanelStep;
    Product product = {nullptr, panel, &stretches[part], 1, lda, kernels.half * lda, int64_t(sizeof(float))};
    if (n + 1 < end * parts) {
      const int64_t bytes = stretches[(n + 1) % parts].steps * kPanelStep;
      product.prefetch(filters_at(n + 1), bytes, ceil_div(tiles, kernels.rows) * stretches[part].steps);
    }
    for (int64_t t = 0, whole; t < tiles; t += whole) {
      const int rows = int(std::min<int64_t>(kernels.rows, tiles - t)), upper = std::min(rows, kernels.half);
      whole = (tiles - t) / rows * rows;
      product.a = reinterpret_cast<const char*>(v + i * v_pitch + t * s.channels);
      const Rows tile = {upper, rows - upper, 0, 0, 0, int(whole / rows)};
      kernels.sum_tile(tile, product, part > 0, m + i * m_pitch + t * s.filters + k, s.filters);
    }
  }
}

}  // namespace

template <class T>
bool winograd_takes(const ConvShape& s) {
  const ConvBy by = conv_by();
  if (kernels<T>() == nullptr || by == ConvBy::Tiles || by == ConvBy::OneDnn) return false;
  if (s.groups > 1) return false;
  for (int i = 0; i < 2; ++i) {
    if (s.taps[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1 || s.padding[i] > 2) return false;
  }
  const Grid grid(s);
  const int64_t threads = at::get_num_threads();  // each has separate rows of tiles
  const bool enough = grid.all >= threads && grid.all * grid.columns >= least_tiles() * threads;
  return (enough || by == ConvBy::Winograd) && tiled_conv_takes<T>(s) &&
         std::max(s.channels, s.filters) <= kMostWinogradChannels;
}

ConvShape transposed(const ConvShape& s) {
  ConvShape t = s;
  t.height = s.rows, t.width = s.columns, t.channels = s.filters;
  t.rows = s.height, t.columns = s.width, t.filters = s.channels;
  for (int i = 0; i < 2; ++i) t.padding[i] = s.taps[i] - 1 - s.padding[i];
  return t;
}

template <class T>
at::Tensor winograd_filters(const at::Tensor& w, bool for_dgrad, Allocate allocate) {
  const WinogradKernels<T>& transforms = *kernels<T>();
  const ConvKernels<float>& tiles = *conv_kernels<float>();
  constexpr int64_t width = kColumns, panel_step = kPanelStep;
  const at::Tensor rows = w.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);  // [K][9][C]
  const auto* from = rows.const_data_ptr<float>();
  const int64_t filters = w.size(0), channels = w.size(1), panels = (for_dgrad ? channels : filters) / width;
  const int64_t panel_bytes = (for_dgrad ? filters : channels) * panel_step, matrix = panels * panel_bytes;
  const at::Tensor packed = allocate(kWinogradProducts * matrix + 64);
  auto* to = reinterpret_cast<char*>(packed.data_ptr<uint8_t>());
  const auto taps = [&](int64_t k, int64_t c, const float*(&g)[9]) {
    for (int i = 0; i < 9; ++i) g[i] = from + (k * 9 + (for_dgrad ? 8 - i : i)) * channels + c;
  };
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const float* g[9];
    for (int64_t panel = begin; panel < end; ++panel) {
      char* first = to + panel * panel_bytes;
      if (for_dgrad) {  // 32 channels of a filter are a step
        for (int64_t k = 0; k < filters; ++k) {
          taps(k, panel * width, g);
          transforms.filter(g, width, reinterpret_cast<float*>(first + k * panel_step), matrix / sizeof(float));
        }
        continue;
      }
      const int64_t pitch = pitch_of(width, channels);
      auto* u = reinterpret_cast<float*>(scratch(0, kWinogradProducts * pitch * int64_t(sizeof(float))));
      for (int64_t k = 0; k < width; ++k) {
        taps(panel * width + k, 0, g);
        transforms.filter(g, channels, u + k * channels, pitch);
      }
      for (int64_t i = 0; i < kWinogradProducts; ++i) {
        tiles.pack_outer(u + i * pitch, true, channels, channels, first + i * matrix);
      }
    }
  });
  return packed;
}

template <class T>
void winograd(
    const ConvShape& s, const T* x, const FillRow<T>& fill, const at::Tensor& filters, const float* scale,
    const float* shift, const T* residual, bool relu, T* y, const Finish& finish) {
  const WinogradKernels<T>& transforms = *kernels<T>();
  const Grid grid(s);
  const int64_t size = std::max<int64_t>(1, kBlockTiles / grid.columns);
  const int64_t threads = at::get_num_threads(), blocks = ceil_div(ceil_div(grid.all, size), threads) * threads;
  const Cut cut = {std::min(blocks, grid.all), grid.all};
  const auto* panels = reinterpret_cast<const char*>(filters.const_data_ptr<uint8_t>());
  const int64_t count = kWinogradProducts * s.filters / kColumns;  // of panels

  // V of rows [first, last) of tiles, and y from their M.
  const auto transform = [&](int64_t first, int64_t last, float* v, int64_t v_pitch) {
    for (const Segment& g : segments(s, grid, first, last)) {
      each_patch(s, grid, g, x, fill, [&](int64_t tile, const T* const(&d)[16]) {
        transforms.input(d, s.channels, v + tile * s.channels, v_pitch);
      });
    }
  };
  const auto untransform = [&](int64_t first, int64_t last, const float* m, int64_t m_pitch, int64_t task) {
    for (const Segment& g : segments(s, grid, first, last)) {
      each_output(s, g, [&](int64_t tile, const int64_t(&at)[4]) {
        T* to[4];
        const T* beside[4];
        for (int i = 0; i < 4; ++i) {
          to[i] = at[i] >= 0 ? y + at[i] : nullptr;
          beside[i] = at[i] >= 0 && residual ? residual + at[i] : nullptr;
        }
        transforms.output(m + tile * s.filters, m_pitch, s.filters, to, beside, scale, shift, relu);
      });
      const int64_t row = g.image * s.rows;
      if (finish) finish(task, (row + g.p0) * s.columns, (row + g.p1) * s.columns);
    }
  };

  if (cut.parts < 4 * threads && count * s.channels * kPanelStep > kFarBytes) {
    // A small batch, and filters that do not stay in L2: the threads share the filters, so that one thread reads each.
    const int64_t tiles = grid.all * grid.columns;
    const int64_t v_pitch = pitch_of(tiles, s.channels), m_pitch = pitch_of(tiles, s.filters);
    const at::Tensor all = empty({kWinogradProducts * (v_pitch + m_pitch)}, at::kFloat, at::MemoryFormat::Contiguous);
    float *const v = all.data_ptr<float>(), *const m = v + kWinogradProducts * v_pitch;
    for_tasks(grid.all, [&](int64_t row) {
      transform(row, row + 1, v + row * grid.columns * s.channels, v_pitch);
    });
    const Cut shares = {std::min(count, 16 * threads), count};
    for_tasks(shares.parts, [&](int64_t i) {
      multiply(s, tiles, v, v_pitch, panels, m, m_pitch, shares.begin(i), shares.begin(i + 1));
    });
    const Cut rows = {std::min(grid.all, kTasks), grid.all};
    for_tasks(rows.parts, [&](int64_t i) {
      untransform(rows.begin(i), rows.begin(i + 1), m + rows.begin(i) * grid.columns * s.filters, m_pitch, i);
    });
    return;
  }
  const int64_t tiles = ceil_div(grid.all, cut.parts) * grid.columns;
  const int64_t v_pitch = pitch_of(tiles, s.channels), m_pitch = pitch_of(tiles, s.filters);
  const auto run = [&](int64_t task, int64_t block) {
    const int64_t first = cut.begin(block), last = cut.begin(block + 1);
    auto* v = reinterpret_cast<float*>(scratch(0, kWinogradProducts * v_pitch * int64_t(sizeof(float))));
    auto* m = reinterpret_cast<float*>(scratch(1, kWinogradProducts * m_pitch * int64_t(sizeof(float))));
    transform(first, last, v, v_pitch);
    multiply(s, (last - first) * grid.columns, v, v_pitch, panels, m, m_pitch, 0, count);
    untransform(first, last, m, m_pitch, task);
  };
  const int64_t tasks = finish ? std::min(cut.parts, kTasks) : cut.parts;
  for_tasks(tasks, [&](int64_t task) {
    for (int64_t i = task * cut.parts / tasks; i < (task + 1) * cut.parts / tasks; ++i) run(task, i);
  });
}

// For blocks of tiles as in the forward pass: transform to V and M, in panels of 32 values, [tile][32], where a tile is
// a step; then U[product][filters][channels] += Mᵀ·V. Tasks and lanes as in tiled_conv_wgrad.
template <class T>
at::Tensor winograd_wgrad(const ConvShape& s, const T* x, const FillRow<T>& fill, const T* dz) {
  const WinogradKernels<T>& transforms = *kernels<T>();
  const ConvKernels<float>& tile_kernels = *conv_kernels<float>();
  constexpr int64_t width = kColumns;
  const Grid grid(s);
  const int64_t size = kWinogradProducts * s.filters * s.channels, threads = at::get_num_threads();
  const bool shared = size > (256 << 10);  // sums that do not fit L2: divided among the threads by filters
  const int64_t chunk = shared ? ceil_div(s.filters / width, threads) * width : s.filters;
  const int64_t chunks = ceil_div(s.filters, chunk), rows = std::max<int64_t>(1, kBlockTiles / grid.columns);
  const int64_t lanes = std::clamp<int64_t>(ceil_div(threads, chunks), 1, grid.all);
  const Cut cut = {std::min(ceil_div(ceil_div(grid.all, rows), lanes) * lanes, grid.all), grid.all};
  const at::Tensor sums =
      empty({lanes, kWinogradProducts, s.filters, s.channels}, at::kFloat, at::MemoryFormat::Contiguous);

  const auto run = [&](int64_t block, bool add, int64_t k0, int64_t filters, float* u) {
    const int64_t first = cut.begin(block), last = cut.begin(block + 1), tiles = (last - first) * grid.columns;
    const int64_t panel = tiles * width, lda = int64_t(sizeof(float));
    const int64_t v_pitch = pitch_of(tiles, s.channels), m_pitch = pitch_of(tiles, filters);
    auto* v = reinterpret_cast<float*>(scratch(0, kWinogradProducts * v_pitch * lda));
    auto* m = reinterpret_cast<float*>(scratch(1, kWinogradProducts * m_pitch * lda));
    for (const Segment& g : segments(s, grid, first, last)) {
      each_patch(s, grid, g, x, fill, [&](int64_t tile, const T*(&d)[16]) {
        for (int64_t c = 0; c < s.channels; c += width) {
          transforms.input(d, width, v + c * tiles + tile * width, v_pitch);
          for (const T*& pixel : d) pixel += width;
        }
      });
      each_output(s, g, [&](int64_t tile, const int64_t(&at)[4]) {
        const T* dy[4];
        for (int i = 0; i < 4; ++i) dy[i] = at[i] >= 0 ? dz + at[i] + k0 : zeros<T>();
        for (int64_t k = 0; k < filters; k += width) {
          transforms.output_gradient(dy, width, m + k * tiles + tile * width, m_pitch);
          for (const T*& pixel : dy) pixel += width;
        }
      });
    }
    const std::vector<Stretch> stretches = stretches_of(tiles, kPanelStep);
    int shape = 0;
    for (int64_t i = 0; i < kWinogradProducts; ++i) {
      for (int64_t c = 0; c < s.channels; c += width) {
        const auto* b = reinterpret_cast<const char*>(v + i * v_pitch + c / width * panel);
        for (int64_t k = 0; k < filters; k += width) {
          const auto* a = reinterpret_cast<const char*>(m + i * m_pitch + k * tiles);
          const Product product = {a, b, stretches.data(), int64_t(stretches.size()), lda, lda * tile_kernels.half,
                                   kPanelStep};
          float* to = u + ((i * s.filters + k0 + k) * s.channels + c);
          tile_kernels.add_panel(product, add, to, s.channels, shape);
        }
      }
    }
  };
  for_tasks(lanes * chunks, [&](int64_t task) {
    const int64_t lane = task / chunks, k0 = task % chunks * chunk, first = lane * cut.parts / lanes;
    for (int64_t i = first; i < (lane + 1) * cut.parts / lanes; ++i) {
      run(i, i > first, k0, std::min(chunk, s.filters - k0), sums.data_ptr<float>() + lane * size);
    }
  });

  const at::Tensor u = lanes == 1 ? sums[0] : sums.sum(0);
  const at::Tensor dw = empty({s.filters, 3, 3, s.channels}, at::kFloat, at::MemoryFormat::Contiguous);
  const float* const from = u.const_data_ptr<float>();
  float* const first = dw.data_ptr<float>();
  at::parallel_for(0, s.filters, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* to[9];
      for (int64_t i = 0; i < 9; ++i) to[i] = first + (k * 9 + i) * s.channels;
      transforms.filter_gradient(from + k * s.channels, s.filters * s.channels, s.channels, to);
    }
  });
  return dw;
}

#define RESNET_FAST_WINOGRAD(T)                                                                                        \
  template bool winograd_takes<T>(const ConvShape&);                                                                   \
  template at::Tensor winograd_filters<T>(const at::Tensor&, bool, Allocate);                                          \
  template void winograd<T>(                                                                                           \
      const ConvShape&, const T*, const FillRow<T>&, const at::Tensor&, const float*, const float*, const T*, bool, T*, \
      const Finish&);                                                                                                  \
  template at::Tensor winograd_wgrad<T>(const ConvShape&, const T*, const FillRow<T>&, const T*);

RESNET_FAST_WINOGRAD(float)
RESNET_FAST_WINOGRAD(bf16)

}  // namespace resnet_fast::cpu
