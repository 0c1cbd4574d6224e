// CUDA's runtime on a CPU, as far as csrc/cuda uses it: what a kernel computes can be tested without a GPU.
//
// A block's threads are contexts of one thread of the CPU, which takes them in turn from barrier to barrier: in
// order, then backwards, so that a barrier that is missing shows in one of the two. Blocks run one after another.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value or configuration"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrComputeCapabilityMajor ? 9 : 1;
  return cudaSuccess;
}

using std::fma;
using std::max;
using std::min;
using std::sqrt;

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

namespace emulator {

// The threads of a block, kept for the next one. They change places by longjmp, which unlike swapcontext asks
// nothing of the system.
class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  void run(dim3 size, const std::function<void()>& body) {
    body_ = &body;
    const unsigned count = size.x * size.y * size.z;
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < count; ++i) {
      threads_[i]->index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
      threads_[i]->finished = false;
    }
    unsigned left = count;
    for (bool forwards = true; left > 0; forwards = !forwards) {
      for (unsigned i = 0; i < count; ++i) {
        current_ = threads_[forwards ? i : count - 1 - i].get();
        if (current_->finished) continue;
        threadIdx = current_->index;
        resume();
        left -= current_->finished;
      }
    }
  }

  // Back to the scheduler, until it is this thread's turn again.
  void pause() {
    if (_setjmp(current_->at) == 0) _longjmp(scheduler_, 1);
  }

 private:
  struct Thread {
    jmp_buf at;
    std::vector<char> stack;
    dim3 index;
    bool finished;
  };

  void resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (!current_->stack.empty()) _longjmp(current_->at, 1);
    current_->stack.resize(1 << 16);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = current_->stack.data();
    start.uc_stack.ss_size = current_->stack.size();
    start.uc_link = nullptr;
    makecontext(&start, &Block::live, 0);
    setcontext(&start);
  }

  static void live() {
    for (Block& block = instance();;) {
      (*block.body_)();
      block.current_->finished = true;
      block.pause();
    }
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  Thread* current_ = nullptr;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
};

inline int64_t launches = 0;

}  // namespace emulator

inline void __syncthreads() { emulator::Block::instance().pause(); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  ++emulator::launches;
  gridDim = grid, blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulator::Block::instance().run(block, [&] { kernel(arguments...); });
    }
  }
  return cudaSuccess;
}
