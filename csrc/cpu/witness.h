// Whether tensors still hold what they held when something was made of them, at a small part of the cost of
// comparing them: for packed filters (packed_filters.h), which follow every change of their parameters.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace resnet_fast::cpu {

// What a tensor held. Its storage (kept weakly, so that another one at the same address is another one), where it
// begins and its version counter tell of what PyTorch knows. Writes past the counter (`.data`, NumPy, another
// process, preserved counters) are told by the values themselves:
//
//   at every call     a vector as a whole; of filters lines of 64 bytes all over the tensor, with at least one of
//                     every filter and of every place in a filter, so that each input channel and any patch of a
//                     hundredth of the values is met; and one of the tensor's at most kParts parts, in turn: any
//                     single value is met within kParts calls
//   after recheck()   all of it, once
//
// Values are kept as sums of 64 bits that differ for certain where one word does, and else but for 1 in 2^64.
class Witness {
 public:
  static constexpr int64_t kParts = 128;

  explicit Witness(const at::Tensor& t);
  bool same(const at::Tensor& t) const;   // by what PyTorch knows
  bool holds(const at::Tensor& t) const;  // by its values too
  bool expired() const { return storage_.expired(); }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  uint32_t version_;
  uint64_t sample_;
  std::vector<uint64_t> parts_;  // of filters
  mutable std::atomic<uint64_t> turn_{0}, checked_;
};

// Have every witness look at all values at its next call: after what changes modules as a whole.
void recheck();

}  // namespace resnet_fast::cpu
