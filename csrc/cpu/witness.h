// Detects changes of tensors at a small part of the cost of comparing them in full: for packed filters
// (packed_filters.h), which must follow every change of their parameters.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace resnet_fast::cpu {

// A record of a tensor's contents. Storage (a weak reference, so a new storage at the same address differs), data
// address and version counter detect the changes that PyTorch records. Checksums of the values detect writes past the
// counter (`.data`, NumPy, another process, preserved counters). They cover:
//
//   at every call     a vector: all values; filters: 64-byte lines spread over the tensor, at least one per filter and
//                     one per position in a filter, which include each input channel and any patch of 1% of the
//                     values; and one of the tensor's parts (at most kParts) in turn, so that any single value is
//                     compared within kParts calls
//   after recheck()   all values, once
//
// The checksums have 64 bits. They always differ if one word does; otherwise a change is missed with probability 2^-64.
class Witness {
 public:
  static constexpr int64_t kParts = 128;

  explicit Witness(const at::Tensor& t);
  bool same(const at::Tensor& t) const;   // by PyTorch's records
  bool holds(const at::Tensor& t) const;  // also by its values
  bool expired() const { return storage_.expired(); }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  uint32_t version_;
  uint64_t sample_;
  std::vector<uint64_t> parts_;  // only for filters
  mutable std::atomic<uint64_t> turn_{0}, checked_;
};

// Makes every witness compare all values at its next call: after operations that change whole modules.
void recheck();

}  // namespace resnet_fast::cpu
