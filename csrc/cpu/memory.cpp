#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <thread>
#include <utility>

#include "../settings.h"

#if defined(__linux__)
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace resnet_fast::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20, kStep = 64 << 10;

// The limit in a control group's file; no limit if the file is missing or contains "max".
int64_t group_limit(const std::string& path) {
  int64_t limit = 0;
  std::ifstream file(path);
  return file >> limit && limit > 0 ? limit : std::numeric_limits<int64_t>::max();
}

// Allocates memory from the system, and returns it. Blocks of at least a huge page start at a huge page.
#if defined(__linux__)
void* map_block(size_t size) {
  const size_t extra = size >= kHugePage ? kHugePage : 0;
  void* const mapped = mmap(nullptr, size + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (extra == 0) return mapped;
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < extra) munmap(begin + before + size, extra - before);
#if defined(MADV_HUGEPAGE)
  madvise(begin + before, size, MADV_HUGEPAGE);  // only advice: errors are ignored
#endif
  return begin + before;
}
void unmap_block(void* block, size_t size) { munmap(block, size); }
#else
void* map_block(size_t size) {
  void* block = nullptr;
  return posix_memalign(&block, kStep, size) == 0 ? block : nullptr;
}
void unmap_block(void* block, size_t) { std::free(block); }
#endif

void* fresh(size_t size) {
  void* block = map_block(size);
  if (block == nullptr) {  // the cache may hold the memory
    empty_cache();
    block = map_block(size);
  }
  TORCH_CHECK_WITH(OutOfMemoryError, block != nullptr, "out of memory: could not allocate ", size, " bytes");
  return block;
}

void report(void* block, int64_t bytes) {
  if (!c10::memoryProfilingEnabled()) return;
  c10::reportMemoryUsageToProfiler(block, bytes, 0, 0, c10::Device(c10::DeviceType::CPU));
}

class FreeBlock;
using FreeBlocks = std::multimap<size_t, Shelf::Place>;

FreeBlocks& free_blocks() {
  static auto* blocks = new FreeBlocks;  // never destroyed: tensors may outlive static objects
  return *blocks;
}

// A cached block, for the next result of about its size.
class FreeBlock final : public Kept {
 public:
  FreeBlock(void* data, size_t size) : Kept(int64_t(size), true), data_(data) {}
  ~FreeBlock() override {
    if (data_ != nullptr) unmap_block(data_, size_t(bytes));
  }
  void leave_index() override { free_blocks().erase(index); }
  void* release() { return std::exchange(data_, nullptr); }

  FreeBlocks::iterator index;

 private:
  void* data_;
};

// A block in use; it is the context of its DataPtr.
struct Block {
  void* data;
  size_t size;
};

void give_back(void* context) {
  const auto block = std::unique_ptr<Block>(static_cast<Block*>(context));
  report(block->data, -int64_t(block->size));
  const auto free = std::make_shared<FreeBlock>(block->data, block->size);
  Shelf& shelf = Shelf::get();
  Shelf::Items excess;
  {
    const std::lock_guard<std::mutex> lock(shelf.mutex);
    free->index = free_blocks().emplace(block->size, shelf.put(free));
    excess = shelf.excess();
  }
}

void unmap(void* context) {
  const auto block = std::unique_ptr<Block>(static_cast<Block*>(context));
  report(block->data, -int64_t(block->size));
  unmap_block(block->data, block->size);
}

// Allocates blocks. If `reuses`, it takes free blocks from the cache and returns them to it.
class BlockAllocator final : public c10::Allocator {
 public:
  explicit BlockAllocator(bool reuses) : reuses_(reuses) {}

  c10::DataPtr allocate(size_t bytes) override {
    size_t size = (bytes + kStep - 1) / kStep * kStep;
    void* block = reuses_ ? find(size) : nullptr;
    if (block == nullptr) block = fresh(size);
    report(block, int64_t(size));
    return {block, new Block{block, size}, reuses_ ? &give_back : &unmap, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

 private:
  // A free block of `size` or slightly more; sets `size` to the block's size.
  static void* find(size_t& size) {
    Shelf& shelf = Shelf::get();
    Shelf::Items taken;
    const std::lock_guard<std::mutex> lock(shelf.mutex);
    const auto found = free_blocks().lower_bound(size);
    if (found == free_blocks().end() || found->first > size + size / 16) return nullptr;
    size = found->first;
    taken = shelf.take(found->second);
    return static_cast<FreeBlock&>(*taken.front()).release();
  }

  const bool reuses_;
};

at::Tensor empty_in(
    BlockAllocator& allocator, at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  at::Tensor t = at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, format);
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory()) {
    at::isFloatingType(dtype) ? t.fill_(std::numeric_limits<double>::quiet_NaN()) : t.fill_(255);
  }
  return t;
}

// The number of threads inside oneDNN, and this thread's nesting depth.
std::atomic<int64_t> inside{0};
std::atomic<bool> forking{false};
thread_local int64_t depth = 0;

}  // namespace

InOneDnn::InOneDnn() {
  Shelf::get();  // registers the fork handlers
  if (depth++ > 0) return;
  while (++inside, forking) {
    --inside;
    while (forking) std::this_thread::yield();
  }
}

InOneDnn::~InOneDnn() {
  if (--depth == 0) --inside;
}

Shelf& Shelf::get() {
  static auto* shelf = new Shelf;  // never destroyed, like free_blocks()
  return *shelf;
}

Shelf::Shelf() : budget_(settings().cpu_cache_mb ? *settings().cpu_cache_mb << 20 : memory_limit() / 8) {
#if defined(__linux__)
  // A child inherits the cache in a consistent state, with its mutex unlocked.
  pthread_atfork(
      [] {
        forking = true;
        for (int i = 0; i < 10000 && inside > (depth > 0); ++i) {
          std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
        get().mutex.lock();
      },
      [] { get().mutex.unlock(), forking = false; },
      [] { get().mutex.unlock(), inside = depth > 0, forking = false; });
#endif
}

Shelf::Place Shelf::put(Item item) {
  count(*item, 1);
  return items_.insert(items_.end(), std::move(item));
}

void Shelf::use(Place place) { items_.splice(items_.end(), items_, place); }

Shelf::Items Shelf::take(Place place) {
  (*place)->leave_index();
  count(**place, -1);
  Items taken;
  taken.splice(taken.end(), items_, place);
  return taken;
}

Shelf::Items Shelf::excess() {
  Items taken;
  while (blocks_ + packed_ > budget_) taken.splice(taken.end(), take(items_.begin()));
  return taken;
}

Shelf::Items Shelf::clear() {
  Items taken;
  while (!items_.empty()) taken.splice(taken.end(), take(items_.begin()));
  return taken;
}

void Shelf::count(const Kept& item, int64_t sign) { (item.block ? blocks_ : packed_) += sign * item.bytes; }

int64_t memory_limit(const std::string& groups, const std::string& root) {
  int64_t limit = int64_t(8) << 30;
#if defined(__linux__)
  limit = int64_t(sysconf(_SC_PHYS_PAGES)) * int64_t(sysconf(_SC_PAGE_SIZE));
#endif
  std::ifstream file(groups);
  for (std::string line; std::getline(file, line);) {  // number:controllers:path; version 2 has no controllers
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    const std::string folder = unified ? root : root + "/memory";
    const std::string name = unified ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {  // and its parents
      limit = std::min(limit, group_limit(folder + path + name));
      if (path.find('/') == std::string::npos) break;
    }
  }
  return limit;
}

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  static auto* allocator = new BlockAllocator(true);
  if (int64_t(c10::multiply_integers(sizes) * options.dtype().itemsize()) < kLeastBytes) {
    return at::empty(sizes, options, format);
  }
  return empty_in(*allocator, sizes, options, format);
}

at::Tensor empty_bytes(int64_t bytes) { return empty({bytes}, at::kByte, at::MemoryFormat::Contiguous); }

at::Tensor empty_kept(int64_t bytes) {
  static auto* allocator = new BlockAllocator(false);
  if (bytes < kLeastBytes) return at::empty({bytes}, at::kByte);
  return empty_in(*allocator, {bytes}, at::kByte, at::MemoryFormat::Contiguous);
}

int64_t empty_cache() {
  Shelf& shelf = Shelf::get();
  int64_t bytes = 0;
  {
    Shelf::Items all;
    const std::lock_guard<std::mutex> lock(shelf.mutex);
    bytes = shelf.blocks() + shelf.packed();
    all = shelf.clear();
  }
#if defined(__GLIBC__)
  malloc_trim(0);  // packed filters in ATen's memory
#endif
  return bytes;
}

}  // namespace resnet_fast::cpu
