#include "witness.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace resnet_fast::cpu {
namespace {

constexpr int64_t kLine = 64, kLeastLines = 256, kLeastPart = 4096, kAhead = 64;

std::atomic<uint64_t> rechecks{0};

// A checksum of lines in eight lanes; each step is a bijection, both of the lane and of the word.
class Sum {
 public:
  void add(const char* line) {
    for (int i = 0; i < 8; ++i) {
      uint64_t word;
      std::memcpy(&word, line + 8 * i, 8);
      lanes_[i] = (lanes_[i] ^ word) * 0x9e3779b97f4a7c15ull;
      lanes_[i] ^= lanes_[i] >> 32;
    }
  }
  void add(const char* bytes, int64_t size) {
    int64_t i = 0;
    for (; i + kLine <= size; i += kLine) add(bytes + i);
    if (i == size) return;
    char rest[kLine] = {};
    std::memcpy(rest, bytes + i, size - i);
    add(rest);
  }
  uint64_t value() const {
    uint64_t sum = 0;
    for (const uint64_t lane : lanes_) sum = (sum ^ lane) * 0x9e3779b97f4a7c15ull, sum ^= sum >> 29;
    return sum;
  }

 private:
  uint64_t lanes_[8] = {1, 2, 3, 4, 5, 6, 7, 8};
};

// The tensor as rows of bytes, one row per index of the dimension that is outermost in memory (filters).
struct Bytes {
  const char* data;
  int64_t rows, row;

  explicit Bytes(const at::Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())), rows(1) {
    int64_t outermost = -1;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) > 1 && t.stride(i) > outermost) outermost = t.stride(i), rows = t.size(i);
    }
    row = size(t) / rows;
  }
  static int64_t size(const at::Tensor& t) { return t.numel() * t.element_size(); }
  int64_t all() const { return rows * row; }
};

int64_t part_count(const Bytes& b) { return std::clamp<int64_t>(b.all() / kLeastPart, 1, Witness::kParts); }

uint64_t part(const Bytes& b, int64_t i, int64_t count) {
  const int64_t begin = b.all() * i / count, end = b.all() * (i + 1) / count;
  Sum sum;
  sum.add(b.data + begin, end - begin);
  return sum.value();
}

uint64_t sample(const Bytes& b) {
  const int64_t lines = (b.row + kLine - 1) / kLine;
  const int64_t wanted = std::max({b.rows, lines, kLeastLines});
  Sum sum;
  if (b.rows * lines <= 2 * wanted) {  // sequential reads cost half as much
    sum.add(b.data, b.all());
    return sum.value();
  }
  // Line i is in row i % rows. Within a pass over the rows, the positions are spread: the step is near the golden
  // section of their number and coprime to it. Each pass begins at a different position.
  int64_t step = std::max<int64_t>(1, lines * 618 / 1000);
  const auto common = [](int64_t a, int64_t c) {
    while (c != 0) std::swap(a %= c, c);
    return a;
  };
  while (common(step, lines) != 1) ++step;
  const int64_t passes = (wanted + b.rows - 1) / b.rows, ahead = (lines + passes - 1) / passes;
  std::array<const char*, kAhead> asked;  // prefetched, in turn
  int64_t count = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    int64_t place = pass * ahead % lines * step % lines;
    for (int64_t row = 0; row < b.rows; ++row) {
      const char*& next = asked[count % kAhead];
      if (count++ >= kAhead) sum.add(next);
      next = b.data + row * b.row + std::min(place * kLine, b.row - kLine);
      __builtin_prefetch(next);
      place += step;
      if (place >= lines) place -= lines;
    }
  }
  for (int64_t i = std::max<int64_t>(0, count - kAhead); i < count; ++i) sum.add(asked[i % kAhead]);
  return sum.value();
}

// The tensor, or a contiguous copy if it has gaps or overlaps itself.
at::Tensor dense(const at::Tensor& t) { return t.is_non_overlapping_and_dense() ? t : t.contiguous(); }

uint64_t values(const at::Tensor& t) {
  const Bytes bytes(t);
  if (t.dim() > 1) return sample(bytes);
  return part(bytes, 0, 1);
}

}  // namespace

Witness::Witness(const at::Tensor& t)
    : storage_(t.storage().getWeakStorageImpl()), data_(t.const_data_ptr()),
      version_(static_cast<uint32_t>(t._version())), checked_(rechecks.load()) {
  const at::Tensor d = dense(t);
  sample_ = values(d);
  if (t.dim() == 1) return;
  const Bytes bytes(d);
  const int64_t count = part_count(bytes);
  for (int64_t i = 0; i < count; ++i) parts_.push_back(part(bytes, i, count));
}

bool Witness::same(const at::Tensor& t) const {
  return !storage_.expired() && storage_._unsafe_get_target() == t.storage().unsafeGetStorageImpl() &&
         data_ == t.const_data_ptr() && version_ == static_cast<uint32_t>(t._version());
}

bool Witness::holds(const at::Tensor& t) const {
  if (!same(t)) return false;
  const at::Tensor d = dense(t);
  if (values(d) != sample_) return false;
  const int64_t count = int64_t(parts_.size());
  if (count == 0) return true;
  const Bytes bytes(d);
  if (const uint64_t now = rechecks.load(); checked_.load() != now) {
    for (int64_t i = 0; i < count; ++i) {
      if (part(bytes, i, count) != parts_[i]) return false;
    }
    checked_.store(now);
    return true;
  }
  const auto i = int64_t(turn_.fetch_add(1) % count);
  return part(bytes, i, count) == parts_[i];
}

void recheck() { ++rechecks; }

}  // namespace resnet_fast::cpu
