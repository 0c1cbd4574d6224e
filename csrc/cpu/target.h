// Included by each kernels_*.cpp before it switches the instruction set; defines the switch. Standard headers come
// before the switch, resnet_fast's after it, so that code shared with other files is compiled for the baseline only:
// all code after the switch is always_inline or in the instruction set's namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#define RESNET_FAST_X86 1
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns about its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#else
#define RESNET_FAST_X86 0
#endif

#define RESNET_FAST_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define RESNET_FAST_TARGET(isa) \
  RESNET_FAST_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define RESNET_FAST_TARGET_END _Pragma("clang attribute pop")
#else
#define RESNET_FAST_TARGET(isa) _Pragma("GCC push_options") RESNET_FAST_PRAGMA(GCC target(isa))
#define RESNET_FAST_TARGET_END _Pragma("GCC pop_options")
#endif
