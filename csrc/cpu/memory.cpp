#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace resnet_fast::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20, kStep = 64 << 10;

size_t default_limit() {
#if defined(__linux__)
  return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE)) / 8;
#else
  return size_t(1) << 30;
#endif
}

size_t limit_from_environment() {
  const char* text = std::getenv("RESNET_FAST_CPU_CACHE_MB");
  if (text == nullptr || *text == 0) return default_limit();
  char* end = nullptr;
  const long long megabytes = std::strtoll(text, &end, 10);
  TORCH_CHECK(*end == 0 && megabytes >= 0, "RESNET_FAST_CPU_CACHE_MB: expected a number of MiB, got '", text, "'");
  return size_t(megabytes) << 20;
}

class BlockCache final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    size_t size = (bytes + kStep - 1) / kStep * kStep;
    void* block = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(size);
      if (found != free_.end() && found->first <= size + size / 16) {
        size = found->first;
        block = found->second;
        cached_ -= size;
        free_.erase(found);
      }
    }
    if (block == nullptr) block = fresh(size);
    report(block, int64_t(size));
    return {block, new Block{this, block, size}, &BlockCache::give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  size_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t had = cached_;
    for (const auto& [size, block] : free_) std::free(block);
    free_.clear();
    cached_ = 0;
    return had;
  }

 private:
  struct Block {
    BlockCache* cache;
    void* data;
    size_t size;
  };

  static void* fresh(size_t size) {
    void* block = nullptr;
    const int failed = posix_memalign(&block, size >= kHugePage ? kHugePage : kStep, size);
    TORCH_CHECK(failed == 0, "out of memory: ", size, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    return block;
  }

  static void give_back(void* context) {
    const auto* block = static_cast<Block*>(context);
    BlockCache& cache = *block->cache;
    report(block->data, -int64_t(block->size));
    {
      const std::lock_guard<std::mutex> lock(cache.mutex_);
      if (cache.cached_ + block->size <= cache.limit_) {
        cache.free_.emplace(block->size, block->data);
        cache.cached_ += block->size;
      } else {
        std::free(block->data);
      }
    }
    delete block;
  }

  static void report(void* block, int64_t bytes) {
    if (!c10::memoryProfilingEnabled()) return;
    c10::reportMemoryUsageToProfiler(block, bytes, 0, 0, c10::Device(c10::DeviceType::CPU));
  }

  const size_t limit_ = limit_from_environment();
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t cached_ = 0;
};

BlockCache& blocks() {
  static auto* cache = new BlockCache;  // never destroyed: tensors may outlive this library's statics
  return *cache;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  if (int64_t(c10::multiply_integers(sizes) * options.dtype().itemsize()) < kLeastBytes) {
    return at::empty(sizes, options, format);
  }
  at::Tensor t = at::detail::empty_generic(sizes, &blocks(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, format);
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory()) {
    at::isFloatingType(dtype) ? t.fill_(std::numeric_limits<double>::quiet_NaN()) : t.fill_(255);
  }
  return t;
}

int64_t empty_cache() { return int64_t(blocks().clear()); }

}  // namespace resnet_fast::cpu
