// Memory that is kept from one call to the next, within one budget: free blocks of large results, and packed
// filters (packed_filters.h). Fresh memory costs page faults, for 50 MB more time than BN and ReLU take, so blocks from
// kLeastBytes up are kept for the next result of about their size.
#pragma once

#include <ATen/ATen.h>

#include <list>
#include <memory>
#include <mutex>
#include <string>

namespace resnet_fast::cpu {

constexpr int64_t kLeastBytes = 256 << 10;

// An uninitialized tensor like at::empty's (NaN where deterministic algorithms fill uninitialized memory);
// torch.profiler sees these blocks as it sees ATen's.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);

// Uninitialized bytes: those of empty(), or of what is kept itself, which at their end go to the system and not
// among the free blocks.
using Allocate = at::Tensor (*)(int64_t bytes);
at::Tensor empty_bytes(int64_t bytes);
at::Tensor empty_kept(int64_t bytes);

// Something that is kept.
class Kept {
 public:
  Kept(int64_t bytes, bool block) : bytes(bytes), block(block) {}
  virtual ~Kept() = default;
  virtual void leave_index() = 0;  // under the lock

  const int64_t bytes;
  const bool block;  // a free block, not packed filters
};

// All that is kept, least recently used first, at most budget() bytes of it. The caller must hold `mutex` for the
// rest. What `put` and `take` return is to be destroyed after the mutex is released, which a fork waits for.
class Shelf {
 public:
  using Item = std::shared_ptr<Kept>;
  using Items = std::list<Item>;
  using Place = Items::iterator;

  static Shelf& get();

  Place put(Item item);    // as the last used
  void use(Place place);   // make it the last used
  Items take(Place place);
  Items excess();          // what is over the budget
  Items clear();

  // settings().cpu_cache_mb in bytes, by default an eighth of memory_limit(); 0 keeps nothing.
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

// Bytes of memory that this process may have: the machine's, or less where a container (a control group of
// Linux, version 1 or 2) has less. `groups` lists the process' groups, `root` is where their files are.
int64_t memory_limit(const std::string& groups = "/proc/self/cgroup", const std::string& root = "/sys/fs/cgroup");

// Give all that is kept back to the system; how many bytes there were.
int64_t empty_cache();

// Lives while a thread calls oneDNN, which holds locks. A fork waits until no thread is inside, for one second at most,
// so that the child does not inherit a lock that no thread of it can open. A thread that comes meanwhile waits for the
// fork.
class InOneDnn {
 public:
  InOneDnn();
  ~InOneDnn();
  InOneDnn(const InOneDnn&) = delete;
};

}  // namespace resnet_fast::cpu
