// Shared by max-pool forward and backward: the position of a pixel, and the codes of an octet of windows.
#pragma once

#include "walk.h"

namespace resnet_fast::cuda {

struct Pixel {
  int64_t image;
  int row, column;
};

// Position of pixel `at`, counted over all images of rows × columns. 32-bit arithmetic where the index fits: a
// 64-bit division costs a hundred instructions, as many as the rest of the work for an octet.
__device__ __forceinline__ Pixel pixel_of(int64_t at, int rows, int columns) {
  if (at >> 32 == 0) {
    const uint32_t pixel = uint32_t(at), line = pixel / uint32_t(columns), image = line / uint32_t(rows);
    return {image, int(line - image * uint32_t(rows)), int(pixel - line * uint32_t(columns))};
  }
  const int64_t line = at / columns, image = line / rows;
  return {image, int(line - image * rows), int(at - line * columns)};
}

// One code per window of an octet; WHOLE: one 8-byte access.
template <bool WHOLE>
__device__ __forceinline__ void store_codes(uint8_t* to, const uint32_t (&codes)[kOctet], int count) {
  if constexpr (WHOLE) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) words[i / 4] |= codes[i] << i % 4 * 8;
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) to[i] = uint8_t(codes[i]);
    }
  }
}

template <bool WHOLE>
__device__ __forceinline__ void load_codes(const uint8_t* from, uint32_t (&codes)[kOctet], int count) {
  if constexpr (WHOLE) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = (i < 4 ? words.x : words.y) >> i % 4 * 8 & 0xffu;
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = i < count ? from[i] : kNoPosition;
  }
}

}  // namespace resnet_fast::cuda
