// What a kernels_*.cpp includes before it switches its instruction set, and the switch. Standard headers
// come before it, ours after it, so that no code shared with other files is compiled for more than the
// baseline: everything below the switch is always_inline or lives in the instruction set's namespace.
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
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own _mm512_undefined_*
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
