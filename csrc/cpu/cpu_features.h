// Which instruction set the CPU kernels use. One binary holds kernels for several; this picks.
#pragma once

#if defined(__x86_64__)
#define RESNET_FAST_X86_64 1
#else
#define RESNET_FAST_X86_64 0
#endif

// AMX wants a compiler that knows it, and Linux, which lends it on request.
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define RESNET_FAST_HAS_AMX 1
#else
#define RESNET_FAST_HAS_AMX 0
#endif

namespace resnet_fast {

// Ordered: each one includes those before it, so `active_isa() >= Isa::AVX512` is a fair question.
enum class Isa {
  Baseline,     // what the compiler assumes: SSE2 on x86-64, NEON on aarch64
  AVX2,         // avx2, fma, f16c
  AVX512,       // + avx512 f, bw, vl, dq
  AVX512_BF16,  // + avx512bf16
  AMX_BF16,     // + amx-tile, amx-bf16, with tiles of 16 rows of 64 bytes that the system lends
};

// "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16": the words RESNET_FAST_CPU_ISA takes.
const char* isa_name(Isa isa);

// The most this CPU and its operating system support; Baseline off x86-64.
Isa detected_isa();

// detected_isa(), or less where settings().cpu_isa asks for less. Asked once, at the first call; throws c10::Error for
// a set that the CPU does not support.
Isa active_isa();

// Who convolves on a CPU that has tiles of ours: what measures faster, or whom RESNET_FAST_CPU_CONV names.
enum class ConvBy { Auto, Tiles, Winograd, OneDnn };

// From the environment variable, "auto", "tiles", "winograd" or "onednn"; throws c10::Error for another word.
ConvBy conv_by();

// Whether the processor says GenuineIntel.
bool is_intel();

}  // namespace resnet_fast
