#include "cpu_features.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "../settings.h"

#if RESNET_FAST_X86_64
#include <cpuid.h>
#endif
#if RESNET_FAST_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resnet_fast {
namespace {

constexpr Isa kIsas[] = {Isa::Baseline, Isa::AVX2, Isa::AVX512, Isa::AVX512_BF16, Isa::AMX_BF16};

#if RESNET_FAST_X86_64
// Two flags that __builtin_cpu_supports of older compilers does not know. They do not include support by the
// operating system, so the caller also checks avx2 or avx512f, which do.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

// On Linux a process must request AMX's tile data; then all its threads may use it. Unusable AMX: some virtual
// machines report AMX but hide the CPUID leaf of the tile shapes, and no tile configuration is valid there.
bool has_amx() {
#if RESNET_FAST_HAS_AMX
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kTileLeaf = 0x1d;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBf16) || !(edx & kTile)) return false;
  if (!__get_cpuid_count(kTileLeaf, 1, &eax, &ebx, &ecx, &edx)) return false;
  const bool eight = ebx >> 16 == 8, kibibyte = eax >> 16 == 1024, wide = (ebx & 0xffff) == 64;
  return eight && kibibyte && wide && (ecx & 0xffff) == 16 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if RESNET_FAST_X86_64
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) {
    return Isa::Baseline;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
    return Isa::AVX2;
  }
  if (!has_avx512bf16()) return Isa::AVX512;
  return has_amx() ? Isa::AMX_BF16 : Isa::AVX512_BF16;
#else
  return Isa::Baseline;
#endif
}

Isa choose() {
  const std::string& asked = settings().cpu_isa;
  if (asked.empty()) return detected_isa();
  const auto* const isa = std::find_if(std::begin(kIsas), std::end(kIsas), [&](Isa i) { return asked == isa_name(i); });
  TORCH_CHECK(isa != std::end(kIsas), "RESNET_FAST_CPU_ISA=", asked,
              ": expected baseline, avx2, avx512, avx512_bf16 or amx_bf16");
  TORCH_CHECK(*isa <= detected_isa(), "RESNET_FAST_CPU_ISA=", asked,
              " is not supported by this CPU, which supports up to ", isa_name(detected_isa()));
  return *isa;
}

bool detect_intel() {
#if RESNET_FAST_X86_64
  unsigned eax = 0, words[3] = {0, 0, 0};
  return __get_cpuid(0, &eax, &words[0], &words[2], &words[1]) && std::memcmp(words, "GenuineIntel", 12) == 0;
#else
  return false;
#endif
}

ConvBy choose_conv() {
  const std::string& asked = settings().cpu_conv;
  return asked == "tiles"      ? ConvBy::Tiles
         : asked == "winograd" ? ConvBy::Winograd
         : asked == "onednn"   ? ConvBy::OneDnn
                               : ConvBy::Auto;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::Baseline:
      return "baseline";
    case Isa::AVX2:
      return "avx2";
    case Isa::AVX512:
      return "avx512";
    case Isa::AVX512_BF16:
      return "avx512_bf16";
    case Isa::AMX_BF16:
      return "amx_bf16";
  }
  return "unknown";
}

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  static const Isa isa = choose();  // if choose() throws, the next call throws again
  return isa;
}

ConvBy conv_by() {
  static const ConvBy by = choose_conv();
  return by;
}

bool is_intel() {
  static const bool intel = detect_intel();
  return intel;
}

}  // namespace resnet_fast
