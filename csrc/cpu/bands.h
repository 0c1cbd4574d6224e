// Shared by resnet_fast's CPU convolutions: axes of a convolution and of its transpose, bands of output rows, tasks
// on threads, and scratch memory.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "conv_kernels.h"

namespace resnet_fast::cpu {

constexpr int64_t kFarBytes = 1 << 20;  // size from which filters do not stay in L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts `total` items into parts of equal size; the first total % parts are one larger.
struct Cut {
  int64_t parts, total;
  int64_t begin(int64_t i) const { return i * (total / parts) + std::min(i, total % parts); }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
  // The begin of part i if the larger parts are spread over all, so that each thread gets as many items.
  int64_t spread(int64_t i) const { return i * total / parts; }
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Scratch memory of this thread, reused between calls; buffers in use at the same time need different slots.
inline char* scratch(int slot, int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> buffers[3];
  thread_local int64_t sizes[3] = {0, 0, 0};
  if (sizes[slot] < bytes) {
    const int64_t size = ceil_div(bytes, 64) * 64;
    buffers[slot].reset();
    sizes[slot] = 0;
    buffers[slot].reset(static_cast<char*>(std::aligned_alloc(64, size)));
    TORCH_CHECK(buffers[slot] != nullptr, "out of memory: could not allocate ", size, " bytes of scratch");
    sizes[slot] = size;
  }
  return buffers[slot].get();
}

// One axis of a convolution or of its transpose: output o reads input (o·mul + first + r·slope) / div with tap r, if
// the division has no remainder.
struct Axis {
  int64_t input, output, taps, mul, div, first, slope;

  bool meets(int64_t o, int64_t r) const { return (o * mul + first + r * slope) % div == 0; }
  int64_t at(int64_t o, int64_t r) const { return (o * mul + first + r * slope) / div; }
  int64_t least(int64_t o) const { return floor_div(o * mul + first + std::min<int64_t>(0, (taps - 1) * slope), div); }
  int64_t most(int64_t o) const { return ceil_div(o * mul + first + std::max<int64_t>(0, (taps - 1) * slope), div); }
};

inline Axis fprop_axis(int64_t input, int64_t output, const ConvShape& s, int i) {
  return {input, output, s.taps[i], s.stride[i], 1, -s.padding[i], s.dilation[i]};
}

inline Axis dgrad_axis(int64_t input, int64_t output, const ConvShape& s, int i) {
  return {input, output, s.taps[i], 1, s.stride[i], s.padding[i], -s.dilation[i]};
}

// Output rows [p0, p1) and columns [q0, q1) of one image.
struct Band {
  int64_t image, p0, p1, q0, q1;
};

// The tasks [front, back) of a thread. It takes the first ones; threads that have none left take the last ones.
class alignas(64) Queue {
 public:
  void fill(int64_t front, int64_t back) { ends_ = pack(front, back); }
  // The task, or -1.
  int64_t take(bool first) {
    uint64_t ends = ends_;
    for (;;) {
      const auto front = int64_t(ends >> 32), back = int64_t(ends & 0xffffffff);
      if (front == back) return -1;
      if (ends_.compare_exchange_weak(ends, first ? pack(front + 1, back) : pack(front, back - 1))) {
        return first ? front : back - 1;
      }
    }
  }

 private:
  static uint64_t pack(int64_t front, int64_t back) { return uint64_t(front) << 32 | uint64_t(back); }
  std::atomic<uint64_t> ends_;
};

// Runs f(state, task) for every task on some thread, which keeps a State between its tasks. Each thread begins with its
// part of them, as Cut divides them: tasks in the order of rows find in its caches what it wrote in the convolution
// before. What another core wrote may be as slow to read as memory. The thread that runs a task must not affect the
// result.
template <class State, class F>
void for_tasks_with(int64_t tasks, F f) {
  const Cut cut = {std::min<int64_t>(tasks, at::get_num_threads()), tasks};
  const auto queues = std::make_unique<Queue[]>(cut.parts);
  for (int64_t i = 0; i < cut.parts; ++i) queues[i].fill(cut.begin(i), cut.begin(i + 1));
  at::parallel_for(0, cut.parts, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      State state;
      for (int64_t i = 0; i < cut.parts; ++i) {
        for (int64_t task; (task = queues[(begin + i) % cut.parts].take(i == 0)) >= 0;) f(state, task);
      }
    }
  });
}

// The same for f(task).
template <class F>
void for_tasks(int64_t tasks, F f) {
  struct None {};
  for_tasks_with<None>(tasks, [&](None&, int64_t task) { f(task); });
}

// The state of the tile registers during a task; it releases them at the end.
template <class T>
struct Tiles {
  explicit Tiles(const ConvKernels<T>& kernels) : kernels(kernels) {}
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (shape != 0) kernels.release();
  }

  const ConvKernels<T>& kernels;
  int shape = 0;
};

// A pointwise convolution, which is a plain GEMM, with all pixels as one row; other shapes unchanged.
inline ConvShape flattened(ConvShape s) {
  if (s.pointwise()) {
    s.width = s.columns = s.images * s.height * s.width;
    s.images = s.height = s.rows = 1;
  }
  return s;
}

}  // namespace resnet_fast::cpu
