// Settings of the native kernels. resnet_fast/runtime/settings.py reads the environment and checks the values;
// `_C.configure` stores them here before the first kernel runs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace resnet_fast {

struct Settings {
  std::string cpu_isa;                  // "baseline" … "amx_bf16"; empty: the best one of the CPU
  std::string cpu_conv = "auto";        // "auto", "tiles", "winograd" or "onednn"
  std::optional<int64_t> cpu_cache_mb;  // default: 1/8 of memory_limit()
  std::string cuda_conv = "cutlass";    // "cudnn"; other values: CUTLASS where it has a kernel
};

inline Settings& settings() {
  static auto* const all = new Settings;
  return *all;
}

}  // namespace resnet_fast
