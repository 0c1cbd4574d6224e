// How the threads of a kernel launch share a dense tensor.
//
// A thread has eight channels (NHWC) or one (NCHW), with their coefficients in registers, and loops over places:
// octets of eight adjacent elements, that is whole 16-byte accesses and one byte of a bit mask. threadIdx.x and
// blockIdx.x select the channels, threadIdx.y and blockIdx.y the first place. Adjacent threads of a block have
// adjacent octets, so that a warp's accesses are contiguous.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "device.h"

namespace resnet_fast::cuda {

constexpr int kThreads = 256;  // maximum per block
constexpr int kAcross = 32;    // maximum of adjacent octets in a block: 512 bytes in bf16
// Minimum of resident blocks per multiprocessor: all kernels but those in double use at most 128 registers.
template <class T>
constexpr int kResident = sizeof(T) > 4 ? 1 : 2;
constexpr int kOctet = 8;

// Places that a thread loads at once, by the number of operands: about 128 bytes in flight.
template <class T, int OPERANDS, int PLACES = 128 / (kOctet * int(sizeof(T)) * OPERANDS)>
constexpr int kAtOnce = PLACES < 1 ? 1 : PLACES > 4 ? 4 : PLACES;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Walk {
  dim3 grid, block;
};

// About `blocks` blocks; fewer or smaller ones (at least a warp) where a thread would get less than `at_once` places.
inline Walk walk(const Shape& s, int at_once, int64_t blocks) {
  constexpr int64_t kWarp = 32, kMostSplits = 65535;
  const int64_t octets = ceil_div(s.inner, kOctet);
  const int64_t columns = s.nhwc ? ceil_div(octets, kAcross) : s.channels;
  const int64_t across = s.nhwc ? ceil_div(octets, columns) : 1;
  const int64_t places = s.nhwc ? s.rows : s.rows / s.channels * octets, lanes = ceil_div(places, at_once);
  const int64_t down = std::min(kThreads / across, std::max(lanes, ceil_div(kWarp, across)));
  const int64_t splits = std::clamp<int64_t>(std::min(ceil_div(blocks, columns), ceil_div(lanes, down)), 1, kMostSplits);
  return {dim3(unsigned(columns), unsigned(splits)), dim3(unsigned(across), unsigned(down))};
}

// One octet: index of its first element and of its mask byte, and its number of elements (0: no octet).
struct Spot {
  int64_t element, byte;
  int count;
};

// The places of one thread, in order.
template <bool NHWC, bool WHOLE>
class Places {
 public:
  __device__ explicit Places(const Shape& s)
      : rows_(s.rows), inner_(s.inner), octets_(int((s.inner + kOctet - 1) / kOctet)), channels_(int(s.channels)) {
    const int64_t first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
    const int64_t threads = int64_t(gridDim.y) * blockDim.y;
    if constexpr (NHWC) {
      octet_ = int(blockIdx.x * blockDim.x + threadIdx.x);
      row_ = octet_ < octets_ ? first : rows_;
      step_rows_ = threads;
    } else {
      octet_ = int(first % octets_);
      row_ = first / octets_ * channels_ + blockIdx.x;
      step_rows_ = threads / octets_ * channels_;
      step_octets_ = int(threads % octets_);
    }
  }

  // The thread's first channel, and its number of channels.
  __device__ int channel() const { return NHWC ? octet_ * kOctet : int(blockIdx.x); }
  __device__ int channels() const { return NHWC ? max(0, min(kOctet, channels_ - channel())) : 1; }

  __device__ bool more() const { return row_ < rows_; }

  __device__ Spot next() {
    Spot spot = {row_ * inner_ + int64_t(octet_) * kOctet, 0, 0};
    if (more()) spot.count = WHOLE ? kOctet : int(min(int64_t(kOctet), inner_ - int64_t(octet_) * kOctet));
    spot.byte = WHOLE ? spot.element / kOctet : row_ * octets_ + octet_;
    row_ += step_rows_;
    if constexpr (!NHWC) {
      octet_ += step_octets_;
      if (octet_ >= octets_) octet_ -= octets_, row_ += channels_;
    }
    return spot;
  }

 private:
  int64_t rows_, inner_, row_, step_rows_;
  int octets_, channels_, octet_, step_octets_ = 0;
};

// Eight elements as they are in memory: two 16-bit elements share a register until they are used.
template <class T>
struct alignas(16) Octet {
  using A = accumulate_t<T>;
  uint32_t words[kOctet * sizeof(T) / 4];

  __device__ __forceinline__ A operator[](int i) const {
    if constexpr (std::is_same_v<T, bf16>) {
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else if constexpr (sizeof(T) == 2) {
      return number<A>(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
    } else {
      T value;
      memcpy(&value, &words[i * sizeof(T) / 4], sizeof(T));
      return value;
    }
  }

  __device__ __forceinline__ void set(const A (&v)[kOctet]) {
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      if constexpr (sizeof(T) == 2) {
        words[i / 2] = pair(v[i], v[i + 1]);
      } else {
        memcpy(&words[i * sizeof(T) / 4], &v[i], 2 * sizeof(T));
      }
    }
  }

 private:
  // One instruction converts both.
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, bf16>) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
      memcpy(&bits, &both, 4);
    } else {
      const __half2 both = __floats2half2_rn(low, high);
      memcpy(&bits, &both, 4);
    }
    return bits;
  }
};

// WHOLE: octets are complete and start at multiples of 16 bytes.
template <bool WHOLE, class T>
__device__ __forceinline__ Octet<T> load(const T* from, const Spot& spot) {
  Octet<T> to;
  if constexpr (WHOLE) {
    const auto* parts = reinterpret_cast<const uint4*>(from + spot.element);
#pragma unroll
    for (int i = 0; i < int(sizeof(to) / sizeof(uint4)); ++i) reinterpret_cast<uint4*>(to.words)[i] = parts[i];
  } else {
    accumulate_t<T> v[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) v[i] = i < spot.count ? number<accumulate_t<T>>(from[spot.element + i]) : 0;
    to.set(v);
  }
  return to;
}

template <bool WHOLE, class T>
__device__ __forceinline__ void store(T* to, const Spot& spot, const Octet<T>& from) {
  if constexpr (WHOLE) {
    auto* parts = reinterpret_cast<uint4*>(to + spot.element);
#pragma unroll
    for (int i = 0; i < int(sizeof(from) / sizeof(uint4)); ++i) parts[i] = reinterpret_cast<const uint4*>(from.words)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < spot.count) to[spot.element + i] = stored<T>(from[i]);
    }
  }
}

// A channel vector's values for the elements of an octet; zeros if the operand is missing.
template <class A, bool NHWC>
class Coefficients {
 public:
  template <class P>
  __device__ Coefficients(const A* from, const P& places) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v_[i] = from && i < places.channels() ? from[places.channel() + i] : A(0);
  }
  __device__ A operator[](int i) const { return v_[NHWC ? i : 0]; }

 private:
  static constexpr int kCount = NHWC ? kOctet : 1;
  A v_[kCount];
};

// Merges the values of a block's column of threads (one threadIdx.x) in a tree of fixed shape; the thread with
// threadIdx.y = 0 gets the result.
template <class V, class F>
__device__ V merge_down(V mine, F merge) {
  __shared__ V all[kThreads];
  const int y = threadIdx.y, here = y * blockDim.x + threadIdx.x;
  for (int gap = 1; gap < int(blockDim.y); gap *= 2) {
    all[here] = mine;
    __syncthreads();
    if (y % (2 * gap) == 0 && y + gap < int(blockDim.y)) mine = merge(mine, all[here + gap * blockDim.x]);
    __syncthreads();
  }
  return mine;
}

// Calls f(std::bool_constant NHWC, std::bool_constant WHOLE) for the kernel variant that these operands need.
template <class T, class F>
cudaError_t with_layout(const Shape& s, std::initializer_list<const T*> operands, F f) {
  bool whole = s.inner % kOctet == 0;
  for (const T* operand : operands) whole = whole && reinterpret_cast<uintptr_t>(operand) % 16 == 0;
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (s.nhwc) return whole ? f(yes, yes) : f(yes, no);
  return whole ? f(no, yes) : f(no, no);
}

}  // namespace resnet_fast::cuda
