// The cache of the CPU kernels, with one limit (the budget): free blocks of large results, and packed filters
// (packed_filters.h). New memory costs page faults; for 50 MB they take longer than BatchNorm and ReLU. So blocks of at
// least kLeastBytes are kept for the next result of about the same size.
#pragma once

#include <ATen/ATen.h>

#include <list>
#include <memory>
#include <mutex>
#include <string>

namespace resnet_fast::cpu {

constexpr int64_t kLeastBytes = 256 << 10;

// An uninitialized tensor, as at::empty (NaN where deterministic algorithms fill uninitialized memory).
// torch.profiler reports these blocks as it reports ATen's.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

// Uninitialized bytes: empty_bytes() uses empty(); empty_kept() is for cached data, and its memory returns to the
// system when freed, not to the free blocks.
using Allocate = at::Tensor (*)(int64_t bytes);
at::Tensor empty_bytes(int64_t bytes);
at::Tensor empty_kept(int64_t bytes);

// An item of the cache.
class Kept {
 public:
  Kept(int64_t bytes, bool block) : bytes(bytes), block(block) {}
  virtual ~Kept() = default;
  virtual void leave_index() = 0;  // called with the lock held

  const int64_t bytes;
  const bool block;  // a free block, not packed filters
};

// All items of the cache, least recently used first, at most budget() bytes. The caller must hold `mutex`, except for
// get() and budget(). Destroy the items that the functions return after the mutex is released: a fork waits for it.
class Shelf {
 public:
  using Item = std::shared_ptr<Kept>;
  using Items = std::list<Item>;
  using Place = Items::iterator;

  static Shelf& get();

  Place put(Item item);    // as the most recently used
  void use(Place place);   // makes it the most recently used
  Items take(Place place);
  Items excess();          // takes items until the rest fits the budget
  Items clear();

  // settings().cpu_cache_mb in bytes, default 1/8 of memory_limit(); 0 disables the cache.
  int64_t budget() const { return budget_; }
  int64_t blocks() const { return blocks_; }
  int64_t packed() const { return packed_; }

  std::mutex mutex;

 private:
  Shelf();
  void count(const Kept& item, int64_t sign);

  const int64_t budget_;
  int64_t blocks_ = 0, packed_ = 0;  // bytes
  Items items_;
};

// Memory limit of this process in bytes: the machine's memory, or the lower limit of a container (Linux control
// groups, version 1 or 2). `groups` lists the process' groups; `root` is the folder of their files.
int64_t memory_limit(const std::string& groups = "/proc/self/cgroup", const std::string& root = "/sys/fs/cgroup");

// Frees all cached memory; returns its size in bytes.
int64_t empty_cache();

// Exists while a thread calls oneDNN, which holds locks. A fork waits, for about a second at most, until no thread is
// inside, so that the child does not inherit a lock that none of its threads can release. A thread that enters
// meanwhile waits for the fork.
class InOneDnn {
 public:
  InOneDnn();
  ~InOneDnn();
  InOneDnn(const InOneDnn&) = delete;
};

}  // namespace resnet_fast::cpu
