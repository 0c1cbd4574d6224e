// The extension resnet_fast._C: build information, settings and caches. Ops register themselves (schemas.cpp).
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/conv_kernels.h"
#include "cpu/cpu_features.h"
#include "cpu/memory.h"
#include "cpu/packed_filters.h"
#include "cpu/witness.h"
#include "program.h"
#include "settings.h"
#include "snapshot.h"

namespace {

namespace py = pybind11;

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, separator);) {
    words.push_back(word);
  }
  return words;
}

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;  // begins with "Clang" or "Apple LLVM"
#else
  return std::string("GCC ") + __VERSION__;
#endif
}

// Facts fixed at compile time (setup.py defines the RESNET_FAST_ macros), and the CPU of this machine.
py::dict build_info() {
  py::dict info;
  info["version"] = RESNET_FAST_VERSION;
  info["build_mode"] = RESNET_FAST_BUILD_MODE;
  info["build_why"] = RESNET_FAST_BUILD_WHY;
  info["compiler"] = compiler();
  info["cxx_flags"] = RESNET_FAST_CXX_FLAGS;
  info["cxx_standard"] = "c++" + std::to_string(__cplusplus / 100 % 100);
  info["torch_version"] = RESNET_FAST_TORCH_VERSION;
  info["pybind11_version"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." +
                             std::to_string(PYBIND11_VERSION_MINOR) + "." +
                             std::to_string(PYBIND11_VERSION_PATCH);
  std::vector<std::string> isas = split(RESNET_FAST_ISAS, ' ');
#if !RESNET_FAST_HAS_AMX  // the compiler does not support it
  isas.erase(std::remove(isas.begin(), isas.end(), "amx_bf16"), isas.end());
#endif
  info["isas"] = isas;
  info["isa_detected"] = resnet_fast::isa_name(resnet_fast::detected_isa());
  info["isa_active"] = resnet_fast::isa_name(resnet_fast::active_isa());
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(RESNET_FAST_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = RESNET_FAST_CUDA_VERSION;
#if defined(RESNET_FAST_WITH_CUTLASS)
  info["cutlass"] = "built in";
#else
  info["cutlass"] = "not found at build time: cuDNN convolves, resnet_fast normalizes in separate launches";
#endif
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cutlass"] = py::none();
#endif
  info["cuda_architectures"] = split(RESNET_FAST_CUDA_ARCHS, ';');
  return info;
}

// The lock must not be held while Python objects are made: the garbage collector may drop packed filters.
std::map<std::string, int64_t> kept() {
  auto& shelf = resnet_fast::cpu::Shelf::get();
  const std::lock_guard<std::mutex> lock(shelf.mutex);
  return {{"budget", shelf.budget()}, {"packed_filters", shelf.packed()}, {"free_blocks", shelf.blocks()}};
}

// Threads that at::parallel_for uses when every thread has work: torch.get_num_threads(), or 1 without
// OpenMP. A different number means that the process has a second OpenMP runtime.
int64_t parallel_threads() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(threads.size());
}

// `steps` products of the convolution tiles for T, from registers, on every thread; their number of floating-point
// operations, 0 without tiles.
template <class T>
int64_t spin(int64_t steps) {
  const auto* const kernels = resnet_fast::conv_kernels<T>();
  if (kernels == nullptr) return 0;
  std::atomic<int64_t> operations{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) operations += kernels->spin(steps);
  });
  return operations;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native ops of resnet_fast (torch.ops.resnet_fast_native) and build information";
  m.def(
      "configure",
      [](std::string cpu_isa, std::string cpu_conv, std::optional<int64_t> cpu_cache_mb, std::string cuda_conv) {
        resnet_fast::settings() = {std::move(cpu_isa), std::move(cpu_conv), cpu_cache_mb, std::move(cuda_conv)};
      },
      py::arg("cpu_isa"), py::arg("cpu_conv"), py::arg("cpu_cache_mb"), py::arg("cuda_conv"),
      "Set the kernels' settings; call it before the first kernel runs (resnet_fast.runtime.settings)");
  m.def("build_info", &build_info,
        "Return compiler, flags, instruction sets, CUDA architectures and versions of this binary");
  m.def("parallel_threads", &parallel_threads,
        "Count the threads that the native kernels run on; expected: torch.get_num_threads()");
  m.def("spin", [](bool bf16, int64_t steps) { return bf16 ? spin<resnet_fast::bf16>(steps) : spin<float>(steps); },
        py::arg("bf16"), py::arg("steps"),
        "Multiply from registers on every thread, as the convolution tiles do; returns the operations, 0 without tiles");
  m.def("empty_cache", &resnet_fast::cpu::empty_cache,
        "Free the memory that the CPU kernels cache; returns its size in bytes");
  m.def("kept", &kept, "Bytes that the CPU kernels cache, by kind, and the limit");
  m.def("memory_limit", &resnet_fast::cpu::memory_limit, py::arg("groups") = "/proc/self/cgroup",
        py::arg("root") = "/sys/fs/cgroup", "Memory limit of this process or its container, in bytes");
  m.def("drop_packed", &resnet_fast::cpu::drop_packed,
        "Drop the packed copies of the filters at this address, and of freed tensors");
  m.def("recheck", &resnet_fast::cpu::recheck, "Compare all values of packed filters with their source at next use");
  resnet_fast::bind_program(m);
  resnet_fast::bind_snapshot(m);
}
