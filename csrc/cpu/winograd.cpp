#include "winograd.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "bands.h"
#include "conv_kernels.h"
#include "cpu_features.h"
#include "memory.h"

namespace resnet_fast::cpu {
namespace {

template <class T, int kTile>
const WinogradKernels<T>& kernels() {
#if RESNET_FAST_X86_64
  return active_isa() >= Isa::AVX512 ? avx512::winograd_kernels<T, kTile>() : avx2::winograd_kernels<T, kTile>();
#else
  TORCH_INTERNAL_ASSERT(false);
#endif
}

// Tiles of size×size outputs: rows and columns per image, and rows over all images.
struct Grid {
  int64_t size, rows, columns, all;

  Grid(const ConvShape& s, int64_t size)
      : size(size), rows(ceil_div(s.rows, size)), columns(ceil_div(s.columns, size)), all(s.images * rows) {}
};

constexpr int products_of(int tile) { return (tile + 2) * (tile + 2); }

// Tiles per block of m = 2 and of dw; a block is transformed, multiplied and transformed back as a whole. It is large
// enough that the filters, which each block reads, are a small part of its traffic, and small enough that with few
// filters its products stay in L2 (measured: the fastest of 56 to 336). With m = 4 a tile has four times the outputs.
constexpr int64_t kBlockTiles = 112;

// Tiles per thread from which fewer products outweigh larger filters (measured).
int64_t least_tiles(int tile, bool keeps) {
  return tile == 4 ? (keeps ? 24 : 96) : active_isa() >= Isa::AVX512 ? 12 : 8;
}

// The most bytes of U that are kept with m = 4, where it takes four to eight times the memory of the tiles' filters. A
// larger one is made panel by panel in every call, for up to so many tiles per thread.
constexpr int64_t kMostBytes = 4 << 20, kPanelTiles = 128;

// Rows of tiles of one image in a block; `tile` is the first one's index in the block. They give rows [p0, p1) of y
// from rows [h0, h1) of x and zeros.
struct Segment {
  int64_t image, tile, rows, p0, p1, h0, h1;
};

std::vector<Segment> segments(const ConvShape& s, const Grid& grid, int64_t first, int64_t last) {
  std::vector<Segment> all;
  for (int64_t row = first; row < last;) {
    const int64_t image = row / grid.rows, in_image = row % grid.rows;
    const int64_t rows = std::min(last - row, grid.rows - in_image);
    const int64_t p0 = grid.size * in_image, p1 = p0 + grid.size * rows;
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
template <int kTile, class T, class F>
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
  constexpr int side = kTile + 2;
  const T* rows[side];
  const T* d[side * side];
  int64_t tile = g.tile;
  for (int64_t p = g.p0; p < g.p0 + grid.size * g.rows; p += grid.size) {
    for (int64_t i = 0; i < side; ++i) {
      const int64_t h = p - s.padding[0] + i;
      rows[i] = h >= g.h0 && h < g.h1 ? lines + (h - g.h0) * line : nullptr;
    }
    for (int64_t q = 0; q < grid.size * grid.columns; q += grid.size) {
      for (int64_t i = 0; i < side * side; ++i) {
        const int64_t w = q - s.padding[1] + i % side;
        const T* const row = rows[i / side];
        d[i] = row && w >= 0 && w < s.width ? row + w * s.channels : zeros<T>();
      }
      f(tile++, d);
    }
  }
}

// f(tile, indices of its pixels in y) for the tiles of a segment; the index of a pixel outside is -1.
template <int kTile, class F>
void each_output(const ConvShape& s, const Segment& g, F f) {
  int64_t tile = g.tile;
  for (int64_t p = g.p0; p < g.p1; p += kTile) {
    for (int64_t q = 0; q < s.columns; q += kTile) {
      int64_t at[kTile * kTile];
      for (int64_t i = 0; i < kTile * kTile; ++i) {
        const int64_t row = p + i / kTile, column = q + i % kTile;
        at[i] = row < s.rows && column < s.columns ? ((g.image * s.rows + row) * s.columns + column) * s.filters : -1;
      }
      f(tile++, at);
    }
  }
}

// Bytes between the panels of U of one product and of the next: a cache line more, so that they do not share cache sets.
int64_t u_pitch(const ConvShape& s) { return s.filters * s.channels * int64_t(sizeof(float)) + 64; }

std::vector<Stretch> stretches_of(int64_t steps, int64_t a_step) {
  const ConvKernels<float>& kernels = *conv_kernels<float>();
  std::vector<Stretch> stretches;
  for (int64_t i = 0; i < steps; i += kernels.depth) {
    stretches.push_back({i * a_step, i * kPanelStep, std::min(kernels.depth, steps - i)});
  }
  return stretches;
}

// Whether U is kept, and not made in every call.
bool keeps(const ConvShape& s, int tile) { return tile == 2 || products_of(tile) * u_pitch(s) <= kMostBytes; }

// M = V·U for panels [begin, end) of the filters of all products. What is needed next is prefetched: U, or, if
// `fresh`, V, because U is one panel per product, just made.
void multiply(
    const ConvShape& s, int64_t tiles, const float* v, int64_t v_pitch, const char* u, float* m, int64_t m_pitch,
    int64_t begin, int64_t end, bool fresh) {
  const ConvKernels<float>& kernels = *conv_kernels<float>();
  const int64_t lda = s.channels * int64_t(sizeof(float)), panels = s.filters / kColumns;
  const std::vector<Stretch> stretches = stretches_of(s.channels, sizeof(float));
  const auto parts = int64_t(stretches.size());
  const auto panel_at = [&](int64_t j) { return u + j / panels * u_pitch(s) + j % panels * s.channels * kPanelStep; };
  for (int64_t n = begin * parts; n < end * parts; ++n) {
    const int64_t j = n / parts, part = n % parts, i = j / panels, k = j % panels * kColumns;
    Product product = {nullptr, panel_at(j), &stretches[part], 1, lda, kernels.half * lda, int64_t(sizeof(float))};
    const int64_t steps = ceil_div(tiles, kernels.rows) * stretches[part].steps;
    if (fresh && j + 1 < end) {
      const int64_t bytes = tiles * lda / parts;
      product.prefetch(reinterpret_cast<const char*>(v + (i + 1) * v_pitch) + part * bytes, bytes, steps, 64);
    } else if (!fresh && n + 1 < end * parts) {
      const Stretch& next = stretches[(n + 1) % parts];
      product.prefetch(panel_at((n + 1) / parts) + next.b, next.steps * kPanelStep, steps);
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
int winograd_tile(const ConvShape& s) {
  const ConvBy by = conv_by();
  const ConvKernels<T>* const tiles = conv_kernels<T>();
  if (tiles == nullptr || tiles->steps > 1 || by == ConvBy::Tiles || by == ConvBy::OneDnn || s.groups > 1) return 0;
  for (int i = 0; i < 2; ++i) {
    if (s.taps[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1 || s.padding[i] > 2) return 0;
  }
  if (!tiled_conv_takes<T>(s) || std::max(s.channels, s.filters) > kMostWinogradChannels) return 0;
  const int64_t threads = at::get_num_threads();  // each has separate rows of tiles
  const auto enough = [&](int tile) {
    const Grid grid(s, tile);
    const int64_t least = least_tiles(tile, keeps(s, tile));
    return by == ConvBy::Winograd || (grid.all >= threads && grid.all * grid.columns >= least * threads);
  };
  if constexpr (std::is_same_v<T, bf16>) {
    const bool products = tiles->values > 1;  // of bf16: m = 2 is not faster
    if ((products || keeps(s, 4)) && enough(4)) return 4;
    if (products) return 0;
  }
  return enough(2) ? 2 : 0;
}

template <class T>
bool winograd_keeps(const ConvShape& s) {
  const int tile = winograd_tile<T>(s);
  return tile > 0 && keeps(s, tile);
}

ConvShape transposed(const ConvShape& s) {
  ConvShape t = s;
  t.height = s.rows, t.width = s.columns, t.channels = s.filters;
  t.rows = s.height, t.columns = s.width, t.filters = s.channels;
  for (int i = 0; i < 2; ++i) t.padding[i] = s.taps[i] - 1 - s.padding[i];
  return t;
}

namespace {

// f(m as a constant) for the shape.
template <class T, class F>
auto with_tile(const ConvShape& s, F f) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (winograd_tile<T>(s) == 4) return f(std::integral_constant<int, 4>());
  }
  return f(std::integral_constant<int, 2>());
}

// A panel of U, of filters as the tiles pack them.
template <class T, int kTile>
void make_panel(
    const ConvShape& s, const at::Tensor& packed, int64_t panel, bool rotated, char* u, int64_t pitch) {
  const ConvKernels<T>& tiles = *conv_kernels<T>();
  const int64_t tap_bytes = tiles.steps_of(s.channels) * kPanelStep;
  const auto* from = reinterpret_cast<const char*>(packed.const_data_ptr<uint8_t>());
  const char* g[9];
  for (int64_t i = 0; i < 9; ++i) g[i] = from + (panel * 9 + (rotated ? 8 - i : i)) * tap_bytes;
  kernels<T, kTile>().panel(g, tiles.values, s.channels, reinterpret_cast<float*>(u), pitch / int64_t(sizeof(float)));
}

template <class T, int kTile>
at::Tensor transformed(const ConvShape& s, const at::Tensor& packed, bool rotated, Allocate allocate) {
  const at::Tensor u = allocate(products_of(kTile) * u_pitch(s) + 64);
  auto* to = reinterpret_cast<char*>(u.data_ptr<uint8_t>());
  for_tasks(s.filters / kColumns, [&](int64_t panel) {
    make_panel<T, kTile>(s, packed, panel, rotated, to + panel * s.channels * kPanelStep, u_pitch(s));
  });
  return u;
}

template <class T, int kTile>
bool convolve(
    const ConvShape& s, const T* x, const FillRow<T>& fill, const at::Tensor& filters, bool rotated,
    const float* scale, const float* shift, const T* residual, bool relu, T* y, const Finish& finish) {
  const WinogradKernels<T>& transforms = kernels<T, kTile>();
  constexpr int products = products_of(kTile);
  const Grid grid(s, kTile);
  const int64_t size = std::max<int64_t>(1, kBlockTiles / (kTile == 2 ? 1 : 4) / grid.columns);
  const int64_t threads = at::get_num_threads(), blocks = ceil_div(ceil_div(grid.all, size), threads) * threads;
  const Cut cut = {std::min(blocks, grid.all), grid.all};
  std::atomic<bool> finite{true};

  // V of rows [first, last) of tiles; y from their M, which has `width` filters from k0 on; and the finish of this y.
  const auto transform = [&](int64_t first, int64_t last, float* v, int64_t v_pitch) {
    for (const Segment& g : segments(s, grid, first, last)) {
      each_patch<kTile>(s, grid, g, x, fill, [&](int64_t tile, const T* const* d) {
        transforms.input(d, s.channels, v + tile * s.channels, v_pitch);
      });
    }
  };
  const auto untransform = [&](int64_t first, int64_t last, const float* m, int64_t m_pitch, int64_t k0,
                               int64_t width) {
    for (const Segment& g : segments(s, grid, first, last)) {
      each_output<kTile>(s, g, [&](int64_t tile, const int64_t* at) {
        constexpr int pixels = kTile * kTile;
        T* to[pixels];
        const T* beside[pixels];
        for (int i = 0; i < pixels; ++i) {
          to[i] = at[i] >= 0 ? y + at[i] + k0 : nullptr;
          beside[i] = at[i] >= 0 && residual ? residual + at[i] + k0 : nullptr;
        }
        const float *const a = scale ? scale + k0 : nullptr, *const b = shift ? shift + k0 : nullptr;
        if (!transforms.output(m + tile * width, m_pitch, width, to, beside, a, b, relu)) finite = false;
      });
    }
  };
  const auto end = [&](int64_t first, int64_t last, int64_t task) {
    for (const Segment& g : segments(s, grid, first, last)) {
      const int64_t row = g.image * s.rows;
      if (finish) finish(task, (row + g.p0) * s.columns, (row + g.p1) * s.columns);
    }
  };

  if (!keeps(s, kTile)) {
    // Each thread makes all panels for its tiles, whose V stays in L3; a panel is read from L2.
    ConvShape one = s;
    one.filters = kColumns;
    const int64_t panels = s.filters / kColumns, most = std::max<int64_t>(1, threads * kPanelTiles / grid.columns);
    const Cut groups = {ceil_div(grid.all, most), grid.all};
    for (int64_t group = 0; group < groups.parts; ++group) {
      const int64_t row0 = groups.begin(group), rows = groups.size(group);
      const Cut parts = {std::min({threads, kTasks, rows}), rows};
      const int64_t v_pitch = pitch_of(rows * grid.columns, s.channels);
      const at::Tensor all = empty({products * v_pitch}, at::kFloat, at::MemoryFormat::Contiguous);
      const auto v = [&](int64_t part) { return all.data_ptr<float>() + parts.begin(part) * grid.columns * s.channels; };
      const auto first = [&](int64_t part) { return row0 + parts.begin(part); };
      for_tasks(parts.parts, [&](int64_t i) { transform(first(i), first(i + 1), v(i), v_pitch); });
      for_tasks(parts.parts * panels, [&](int64_t task) {
        const int64_t i = task / panels, panel = task % panels, tiles = parts.size(i) * grid.columns;
        const int64_t m_pitch = pitch_of(tiles, kColumns);
        char* const u = scratch(0, products * u_pitch(one));
        auto* m = reinterpret_cast<float*>(scratch(1, products * m_pitch * int64_t(sizeof(float))));
        make_panel<T, kTile>(s, filters, panel, rotated, u, u_pitch(one));
        multiply(one, tiles, v(i), v_pitch, u, m, m_pitch, 0, products, true);
        untransform(first(i), first(i + 1), m, m_pitch, panel * kColumns, kColumns);
      });
      for_tasks(parts.parts, [&](int64_t i) { end(first(i), first(i + 1), i); });
    }
    return finite;
  }
  const auto* u = reinterpret_cast<const char*>(filters.const_data_ptr<uint8_t>());
  const int64_t count = products * s.filters / kColumns;  // of panels
  if (cut.parts < 4 * threads && count * s.channels * kPanelStep > kFarBytes) {
    // A small batch, and filters that do not stay in L2: the threads share the filters, so that one thread reads each.
    const int64_t tiles = grid.all * grid.columns;
    const int64_t v_pitch = pitch_of(tiles, s.channels), m_pitch = pitch_of(tiles, s.filters);
    const at::Tensor all = empty({products * (v_pitch + m_pitch)}, at::kFloat, at::MemoryFormat::Contiguous);
    float *const v = all.data_ptr<float>(), *const m = v + products * v_pitch;
    for_tasks(grid.all, [&](int64_t row) {
      transform(row, row + 1, v + row * grid.columns * s.channels, v_pitch);
    });
    const Cut shares = {std::min(count, 16 * threads), count};
    for_tasks(shares.parts, [&](int64_t i) {
      multiply(s, tiles, v, v_pitch, u, m, m_pitch, shares.begin(i), shares.begin(i + 1), false);
    });
    const Cut rows = {std::min(grid.all, kTasks), grid.all};
    for_tasks(rows.parts, [&](int64_t i) {
      const int64_t first = rows.begin(i), last = rows.begin(i + 1);
      untransform(first, last, m + first * grid.columns * s.filters, m_pitch, 0, s.filters);
      end(first, last, i);
    });
    return finite;
  }
  const int64_t tiles = ceil_div(grid.all, cut.parts) * grid.columns;
  const int64_t v_pitch = pitch_of(tiles, s.channels), m_pitch = pitch_of(tiles, s.filters);
  const auto run = [&](int64_t task, int64_t block) {
    const int64_t first = cut.spread(block), last = cut.spread(block + 1);
    auto* v = reinterpret_cast<float*>(scratch(0, products * v_pitch * int64_t(sizeof(float))));
    auto* m = reinterpret_cast<float*>(scratch(1, products * m_pitch * int64_t(sizeof(float))));
    transform(first, last, v, v_pitch);
    multiply(s, (last - first) * grid.columns, v, v_pitch, u, m, m_pitch, 0, count, false);
    untransform(first, last, m, m_pitch, 0, s.filters);
    end(first, last, task);
  };
  const int64_t tasks = finish ? std::min(cut.parts, kTasks) : cut.parts;
  for_tasks(tasks, [&](int64_t task) {
    for (int64_t i = task * cut.parts / tasks; i < (task + 1) * cut.parts / tasks; ++i) run(task, i);
  });
  return finite;
}

// For blocks of tiles as in the forward pass: transform to V and M, in panels of 32 values, [tile][32], where a tile is
// a step; then U[product][filters][channels] += Mᵀ·V. Tasks and lanes as in tiled_conv_wgrad.
template <class T, int kTile>
at::Tensor wgrad(const ConvShape& s, const T* x, const FillRow<T>& fill, const T* dz) {
  const WinogradKernels<T>& transforms = kernels<T, kTile>();
  const ConvKernels<float>& tile_kernels = *conv_kernels<float>();
  constexpr int64_t width = kColumns;
  constexpr int products = products_of(kTile);
  const Grid grid(s, kTile);
  const int64_t size = products * s.filters * s.channels, threads = at::get_num_threads();
  const bool shared = size > (256 << 10);  // sums that do not fit L2: divided among the threads by filters
  const int64_t chunk = shared ? ceil_div(s.filters / width, threads) * width : s.filters;
  const int64_t chunks = ceil_div(s.filters, chunk), rows = std::max<int64_t>(1, kBlockTiles / grid.columns);
  const int64_t lanes = std::clamp<int64_t>(ceil_div(threads, chunks), 1, grid.all);
  const Cut cut = {std::min(ceil_div(ceil_div(grid.all, rows), lanes) * lanes, grid.all), grid.all};
  const at::Tensor sums =
      empty({lanes, products, s.filters, s.channels}, at::kFloat, at::MemoryFormat::Contiguous);

  const auto run = [&](int64_t block, bool add, int64_t k0, int64_t filters, float* u) {
    const int64_t first = cut.spread(block), last = cut.spread(block + 1), tiles = (last - first) * grid.columns;
    const int64_t panel = tiles * width, lda = int64_t(sizeof(float));
    const int64_t v_pitch = pitch_of(tiles, s.channels), m_pitch = pitch_of(tiles, filters);
    auto* v = reinterpret_cast<float*>(scratch(0, products * v_pitch * lda));
    auto* m = reinterpret_cast<float*>(scratch(1, products * m_pitch * lda));
    for (const Segment& g : segments(s, grid, first, last)) {
      each_patch<kTile>(s, grid, g, x, fill, [&](int64_t tile, const T* (&d)[products]) {
        for (int64_t c = 0; c < s.channels; c += width) {
          transforms.input(d, width, v + c * tiles + tile * width, v_pitch);
          for (const T*& pixel : d) pixel += width;
        }
      });
      each_output<kTile>(s, g, [&](int64_t tile, const int64_t* at) {
        const T* dy[kTile * kTile];
        for (int i = 0; i < kTile * kTile; ++i) dy[i] = at[i] >= 0 ? dz + at[i] + k0 : zeros<T>();
        for (int64_t k = 0; k < filters; k += width) {
          transforms.output_gradient(dy, width, m + k * tiles + tile * width, m_pitch);
          for (const T*& pixel : dy) pixel += width;
        }
      });
    }
    const std::vector<Stretch> stretches = stretches_of(tiles, kPanelStep);
    int shape = 0;
    for (int64_t i = 0; i < products; ++i) {
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
  std::atomic<bool> finite{true};
  at::parallel_for(0, s.filters, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* to[9];
      for (int64_t i = 0; i < 9; ++i) to[i] = first + (k * 9 + i) * s.channels;
      if (!transforms.filter_gradient(from + k * s.channels, s.filters * s.channels, s.channels, to)) finite = false;
    }
  });
  return finite ? dw : at::Tensor();
}

}  // namespace

template <class T>
at::Tensor winograd_filters(const ConvShape& s, const at::Tensor& packed, bool rotated, Allocate allocate) {
  return with_tile<T>(s, [&](auto m) { return transformed<T, m.value>(s, packed, rotated, allocate); });
}

template <class T>
bool winograd(
    const ConvShape& s, const T* x, const FillRow<T>& fill, const at::Tensor& filters, bool rotated,
    const float* scale, const float* shift, const T* residual, bool relu, T* y, const Finish& finish) {
  return with_tile<T>(s, [&](auto m) {
    return convolve<T, m.value>(s, x, fill, filters, rotated, scale, shift, residual, relu, y, finish);
  });
}

template <class T>
at::Tensor winograd_wgrad(const ConvShape& s, const T* x, const FillRow<T>& fill, const T* dz) {
  return with_tile<T>(s, [&](auto m) { return wgrad<T, m.value>(s, x, fill, dz); });
}

#define RESNET_FAST_WINOGRAD(T)                                                                                        \
  template int winograd_tile<T>(const ConvShape&);                                                                     \
  template bool winograd_keeps<T>(const ConvShape&);                                                                   \
  template at::Tensor winograd_filters<T>(const ConvShape&, const at::Tensor&, bool, Allocate);                        \
  template bool winograd<T>(                                                                                           \
      const ConvShape&, const T*, const FillRow<T>&, const at::Tensor&, bool, const float*, const float*, const T*,    \
      bool, T*, const Finish&);                                                                                        \
  template at::Tensor winograd_wgrad<T>(const ConvShape&, const T*, const FillRow<T>&, const T*);

RESNET_FAST_WINOGRAD(float)
RESNET_FAST_WINOGRAD(bf16)

}  // namespace resnet_fast::cpu
