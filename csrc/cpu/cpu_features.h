// Selects the instruction set of the CPU kernels at run time; one binary contains kernels for several.
#pragma once

#if defined(__x86_64__)
#define RESNET_FAST_X86_64 1
#else
#define RESNET_FAST_X86_64 0
#endif

// AMX needs a compiler that supports it, and Linux, which enables it on request.
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define RESNET_FAST_HAS_AMX 1
#else
#define RESNET_FAST_HAS_AMX 0
#endif

namespace resnet_fast {

// Ordered: each includes those before it, so `active_isa() >= Isa::AVX512` is valid.
enum class Isa {
  Baseline,     // what the compiler assumes: SSE2 on x86-64, NEON on aarch64
  AVX2,         // avx2, fma, f16c
  AVX512,       // + avx512 f, bw, vl, dq
  AVX512_BF16,  // + avx512bf16
  AMX_BF16,     // + amx-tile, amx-bf16, with tiles of 16 rows of 64 bytes, enabled by the system
};

// "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16": the values of RESNET_FAST_CPU_ISA.
const char* isa_name(Isa isa);

// The best set that this CPU and its operating system support; Baseline except on x86-64.
Isa detected_isa();

// settings().cpu_isa, or detected_isa() where it is empty. Determined at the first call; throws c10::Error for an
// unknown set, or one that the CPU does not support.
Isa active_isa();

// Which implementation convolves on a CPU with tiles: the faster one by measurement (Auto), or the one set.
enum class ConvBy { Auto, Tiles, Winograd, OneDnn };

// From settings().cpu_conv, "tiles", "winograd" or "onednn"; other values are Auto.
ConvBy conv_by();

// Whether CPUID's vendor is GenuineIntel.
bool is_intel();

}  // namespace resnet_fast
