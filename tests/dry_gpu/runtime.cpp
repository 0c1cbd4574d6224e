// A CUDA runtime and driver for machines without a GPU: memory is host memory, launches are checked
// and counted, and no kernel runs.
//
// Loaded before a CUDA build of PyTorch (LD_PRELOAD) it stands for libcudart, libcuda and what
// PyTorch calls of cuBLAS. Everything on the host is the real thing: PyTorch's allocator, streams and
// graphs, Triton's compiler and launcher, CUTLASS' parameters. So it shows what goes wrong before a
// kernel starts, how many launches a model makes, and what they cost the host; results are what
// happens to be in memory. An error of CUDA's rules (a grid that is too large, a descriptor of
// unaligned memory, a legacy stream while a graph is captured) is returned and told on stderr.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
// A function of that name for the linker, whatever the headers declare, that has nothing to do.
#define SUCCEEDS(name) \
  API int dry_##name(...) __asm__(#name); \
  int dry_##name(...) { return 0; }

namespace {

constexpr int kMultiprocessors = 132, kOptinShared = 227 << 10, kShared = 48 << 10;
constexpr size_t kMebibyte = size_t(1) << 20;

struct Function {
  std::string name;
  int max_shared = kShared;
};
struct Stream {
  int device = 0;
  unsigned long long capture = 0;
};
struct Event {
  std::chrono::steady_clock::time_point when;
  unsigned long long capture = 0;
};
struct Graph {  // or an executable of one
  long nodes = 0;
  std::vector<std::shared_ptr<void>> held = {};  // user objects; a copy holds them too
};

// Never destroyed: libraries still call while the process ends.
template <class T>
T& forever() {
  static T* const it = new T;
  return *it;
}

std::mutex lock;
std::atomic<long> launches{0}, errors{0}, descriptors{0};
unsigned long long capture = 0, captures = 0;  // the capture that is on, and how many there were
Graph* filled = nullptr;  // by the capture that is on
size_t used = 0;
thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;

int number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
int devices() { return number("DRY_GPU_COUNT", 1); }
size_t memory() { return size_t(number("DRY_GPU_GIB", 139)) << 30; }

auto& functions() { return forever<std::unordered_map<const void*, Function>>(); }
auto& names() { return forever<std::vector<const char*>>(); }
auto& allocations() { return forever<std::map<uintptr_t, size_t>>(); }
auto& pinned() { return forever<std::map<uintptr_t, size_t>>(); }

cudaError_t failed(cudaError_t error, const std::string& why) {
  ++errors;
  std::fprintf(stderr, "dry GPU: error %d: %s\n", int(error), why.c_str());
  return last_error = error;
}

bool is_legacy(cudaStream_t s) { return s == nullptr || s == cudaStreamLegacy; }

Stream& stream_of(cudaStream_t s) {
  static Stream legacy[16];
  return is_legacy(s) || s == cudaStreamPerThread ? legacy[device] : *reinterpret_cast<Stream*>(s);
}

// Whether work may go to the stream now.
cudaError_t check(cudaStream_t s, const char* what) {
  if (capture != 0 && is_legacy(s)) {
    return failed(cudaErrorStreamCaptureImplicit, std::string(what) + " on the legacy stream in a capture");
  }
  if (capture != 0 && stream_of(s).capture != capture) {
    return failed(cudaErrorStreamCaptureIsolation, std::string(what) + " on a stream outside of the capture");
  }
  if (!is_legacy(s) && stream_of(s).device != device) {
    return failed(cudaErrorInvalidResourceHandle, std::string(what) + " on a stream of another device");
  }
  return cudaSuccess;
}

cudaError_t not_in_capture(const char* what) {
  return capture == 0 ? cudaSuccess : failed(cudaErrorStreamCaptureUnsupported, std::string(what) + " in a capture");
}

void count(const char* name) {
  ++launches;
  const std::lock_guard<std::mutex> guard(lock);
  if (capture != 0) ++filled->nodes;
  names().push_back(name);
}

cudaError_t launch(const char* name, dim3 g, dim3 b, size_t shared, int max_shared, cudaStream_t s) {
  if (const cudaError_t error = check(s, name)) return error;
  const bool grid = g.x && g.y && g.z && g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535;
  const bool block = b.x && b.y && b.z && size_t(b.x) * b.y * b.z <= 1024 && b.z <= 64;
  if (!grid || !block) {
    char sizes[160];
    std::snprintf(sizes, sizeof sizes, ": grid %u %u %u, block %u %u %u", g.x, g.y, g.z, b.x, b.y, b.z);
    return failed(cudaErrorInvalidConfiguration, std::string(name) + sizes);
  }
  if (shared > size_t(max_shared)) {
    return failed(cudaErrorInvalidValue, std::string(name) + ": more shared memory than it may have");
  }
  count(name);
  return cudaSuccess;
}

cudaError_t launch(const void* function, dim3 g, dim3 b, size_t shared, cudaStream_t s) {
  const auto found = functions().find(function);
  if (found == functions().end()) return failed(cudaErrorInvalidDeviceFunction, "a launch of no kernel");
  return launch(found->second.name.c_str(), g, b, shared, found->second.max_shared, s);
}

size_t pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// Memory that costs nothing until it is written, at a multiple of 2 MiB.
void* reserve(size_t bytes) {
  const size_t size = pages(bytes), around = size + 2 * kMebibyte;
  char* const begin = static_cast<char*>(
      mmap(nullptr, around, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (begin == MAP_FAILED) return nullptr;
  char* const at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + 2 * kMebibyte - 1) / (2 * kMebibyte) *
                                           (2 * kMebibyte));
  if (at > begin) munmap(begin, at - begin);
  if (begin + around > at + size) munmap(at + size, begin + around - (at + size));
  return at;
}

bool holds(const std::map<uintptr_t, size_t>& blocks, const void* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  auto block = blocks.upper_bound(at);
  return block != blocks.begin() && at < (--block)->first + block->second;
}

cudaMemoryType kind_of(const void* p) {
  const std::lock_guard<std::mutex> guard(lock);
  if (holds(allocations(), p)) return cudaMemoryTypeDevice;
  return holds(pinned(), p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
}

// Of an H200 (CUdevice_attribute and cudaDeviceAttr have the same numbers).
int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return kShared;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return kOptinShared;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return kOptinShared + 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return kMultiprocessors;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 3201000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 6144;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return int(60 * kMebibyte);
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    default: return 0;
  }
}

}  // namespace

// What a test asks.
API long dry_launches() { return launches; }
API long dry_errors() { return errors; }
API long dry_descriptors() { return descriptors; }
API void dry_launch(const char* name) { count(forever<std::set<std::string>>().insert(name).first->c_str()); }
API const char* dry_name(long i) { return names()[i]; }
API void dry_reset() {
  const std::lock_guard<std::mutex> guard(lock);
  launches = errors = descriptors = 0;
  names().clear();
}

// Kernels of the runtime.
namespace {
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;
}  // namespace
API void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(std::malloc(16)); }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  const std::lock_guard<std::mutex> guard(lock);
  functions()[host].name = name;
}
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaRegisterManagedVar)
API char __cudaInitModule(void**) { return 1; }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
  pushed.push_back({grid, block, shared, s});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* s) {
  const Configuration c = pushed.back();
  pushed.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<cudaStream_t*>(s) = c.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void**, size_t shared, cudaStream_t s) {
  return launch(reinterpret_cast<const void*>(f), g, b, shared, s);
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t shared, cudaStream_t s) {
  return launch(f, g, b, shared, s);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void**, size_t shared, cudaStream_t s) {
  return launch(f, g, b, shared, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = c->attrs[i].val.clusterDim;
    const dim3 g = c->gridDim;
    const bool whole = g.x % cluster.x == 0 && g.y % cluster.y == 0 && g.z % cluster.z == 0;
    if (!whole || cluster.x * cluster.y * cluster.z > 8) {
      return failed(cudaErrorInvalidClusterSize, "a grid that is no multiple of its cluster, or more than 8 in one");
    }
  }
  return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) { return f(data), cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  *a = {};
  a->maxThreadsPerBlock = 1024, a->numRegs = 64, a->binaryVersion = a->ptxVersion = 90;
  const auto found = functions().find(f);
  a->maxDynamicSharedSizeBytes = found == functions().end() ? kShared : found->second.max_shared;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute which, int value) {
  const auto found = functions().find(f);
  if (found == functions().end()) return failed(cudaErrorInvalidDeviceFunction, "an attribute of no kernel");
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > kOptinShared) {
    return failed(cudaErrorInvalidValue, found->second.name + ": over 227 KiB of shared memory");
  }
  found->second.max_shared = value;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int block, size_t shared,
                                                                      unsigned) {
  *n = std::max(1, std::min(2048 / std::max(block, 1), shared == 0 ? 32 : int(kOptinShared / shared)));
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, block, shared, 0);
}

// Devices.
API cudaError_t cudaGetDeviceCount(int* n) { return *n = devices(), cudaSuccess; }
API cudaError_t cudaGetDevice(int* d) { return *d = device, cudaSuccess; }
API cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= devices()) return failed(cudaErrorInvalidDevice, "no such device");
  return device = d, cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return not_in_capture("cudaDeviceSynchronize"); }
API cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) { return *v = attribute(int(a)), cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  std::strcpy(p->name, "NVIDIA H200 (dry)");
  p->major = 9, p->multiProcessorCount = kMultiprocessors, p->totalGlobalMem = memory();
  p->sharedMemPerBlock = kShared, p->sharedMemPerBlockOptin = kOptinShared;
  p->sharedMemPerMultiprocessor = kOptinShared + 1024, p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048, p->l2CacheSize = int(60 * kMebibyte), p->memoryBusWidth = 6144;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->concurrentKernels = p->unifiedAddressing = 1, p->textureAlignment = 512, p->totalConstMem = 65536;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  return std::snprintf(text, size, "0000:00:00.0"), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "an error of the dry GPU"; }
API const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

// Memory.
API cudaError_t cudaMalloc(void** p, size_t bytes) {
  const std::lock_guard<std::mutex> guard(lock);
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (used + bytes > memory() || (*p = reserve(bytes)) == nullptr) return last_error = cudaErrorMemoryAllocation;
  allocations()[reinterpret_cast<uintptr_t>(*p)] = bytes;
  return used += bytes, cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  const std::lock_guard<std::mutex> guard(lock);
  const auto block = allocations().find(reinterpret_cast<uintptr_t>(p));
  if (block == allocations().end()) return failed(cudaErrorInvalidValue, "cudaFree of what was not allocated");
  munmap(p, pages(block->second));
  used -= block->second;
  return allocations().erase(block), cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  *p = std::aligned_alloc(4096, pages(bytes) + 4096);
  const std::lock_guard<std::mutex> guard(lock);
  return pinned()[reinterpret_cast<uintptr_t>(*p)] = bytes, cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
  const std::lock_guard<std::mutex> guard(lock);
  pinned().erase(reinterpret_cast<uintptr_t>(p));
  return std::free(p), cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *total = memory(), *free = *total - used, cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s) {
  const char* const names[] = {"memcpy H2H", "memcpy H2D", "memcpy D2H", "memcpy D2D", "memcpy"};
  if (const cudaError_t error = check(s, names[int(kind)])) return error;
  std::memcpy(to, from, bytes);
  return count(names[int(kind)]), cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t s) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, s);
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t s) {
  if (const cudaError_t error = check(s, "memset")) return error;
  if (bytes < 8 * kMebibyte) std::memset(to, value, bytes);  // the pages of more would be the machine's
  return count("memset"), cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  *a = {};
  a->type = kind_of(p);
  a->device = a->type == cudaMemoryTypeUnregistered ? -1 : 0;
  if (a->device == 0) a->devicePointer = const_cast<void*>(p);
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static char zeros[1 << 16];
  return *p = zeros, cudaSuccess;
}
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaMemcpyToSymbol)

// Streams, events, graphs.
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  return *s = reinterpret_cast<cudaStream_t>(new Stream{device}), cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaError_t cudaStreamQuery(cudaStream_t) { return not_in_capture("cudaStreamQuery"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return not_in_capture("cudaStreamSynchronize"); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { return *p = 0, cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned) {
  return f(s, cudaSuccess, data), cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  if (capture != 0 && reinterpret_cast<Event*>(e)->capture == capture) stream_of(s).capture = capture;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  if (is_legacy(s)) return failed(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream");
  capture = stream_of(s).capture = ++captures;
  return filled = new Graph, cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(filled);
  return capture = stream_of(s).capture = 0, cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* size) {
  const bool on = capture != 0 && stream_of(s).capture == capture;
  *status = on ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = on ? capture : 0;
  if (graph != nullptr) *graph = on ? reinterpret_cast<cudaGraph_t>(filled) : nullptr;
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (size != nullptr) *size = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(s, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  return std::swap(current, *mode), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) {
  return *e = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete reinterpret_cast<Event*>(e), cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  *reinterpret_cast<Event*>(e) = {std::chrono::steady_clock::now(), stream_of(s).capture};
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return not_in_capture("cudaEventQuery"); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  const auto took = reinterpret_cast<Event*>(to)->when - reinterpret_cast<Event*>(from)->when;
  return *ms = std::max(1e-3f, std::chrono::duration<float, std::milli>(took).count()), cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long) {
  return *to = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph))), cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  return launches += reinterpret_cast<Graph*>(graph)->nodes, cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* n) {
  return *n = reinterpret_cast<Graph*>(graph)->nodes, cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Graph*>(graph), cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<Graph*>(graph), cudaSuccess;
}
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaEventSynchronize)
SUCCEEDS(cudaGraphDebugDotPrint)

// The driver, as Triton and the descriptors of CUTLASS need it.
API CUresult cuDriverGetVersion(int* v) { return *v = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* d, int i) { return *d = i, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* n) { return *n = devices(), CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) { return *v = attribute(a), CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned*, int* active) { return *active = 1, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  return *c = reinterpret_cast<CUcontext>(uintptr_t(d) + 1), CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* c) { return cuDevicePrimaryCtxRetain(c, device); }
API CUresult cuCtxGetDevice(CUdevice* d) { return *d = device, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* v, CUlimit) { return *v = kMebibyte, CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the dry GPU", CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult e, const char** text) { return cuGetErrorString(e, text); }
API CUresult cuModuleLoadData(CUmodule* m, const void*) {
  return *m = reinterpret_cast<CUmodule>(new int), CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* m, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(m, image);
}
API CUresult cuModuleLoad(CUmodule* m, const char* path) { return cuModuleLoadData(m, path); }
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
  return *f = reinterpret_cast<CUfunction>(new Function{name}), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) {
  if (a > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE) return CUDA_ERROR_INVALID_VALUE;  // of a later CUDA
  if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  auto& function = *reinterpret_cast<Function*>(f);
  if (value > kOptinShared) {
    failed(cudaErrorInvalidValue, function.name + ": over 227 KiB of shared memory");
    return CUDA_ERROR_INVALID_VALUE;
  }
  return function.max_shared = value, CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  return *n = kMultiprocessors / 2, CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, CUstream s, void**, void**) {
  const auto& function = *reinterpret_cast<Function*>(f);
  const dim3 grid = {gx, gy, gz}, block = {bx, by, bz};
  const auto stream = reinterpret_cast<cudaStream_t>(s);
  const bool bad = launch(function.name.c_str(), grid, block, shared, function.max_shared, stream);
  return bad ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** args, void** extra) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, args, extra);
}
API CUresult cuPointerGetAttribute(void* to, CUpointer_attribute a, CUdeviceptr p) {
  if (a != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return *static_cast<int*>(to) = 0, CUDA_SUCCESS;
  if (kind_of(reinterpret_cast<void*>(p)) == cudaMemoryTypeUnregistered) {
    failed(cudaErrorInvalidValue, "a kernel's pointer is no memory of the device");
    return CUDA_ERROR_INVALID_VALUE;
  }
  return *static_cast<CUdeviceptr*>(to) = p, CUDA_SUCCESS;
}
API CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute* a, void** to, CUdeviceptr p) {
  for (unsigned i = 0; i < n; ++i) {
    if (const CUresult error = cuPointerGetAttribute(to[i], a[i], p)) return error;
  }
  return CUDA_SUCCESS;
}
API CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* status) {
  const bool on = capture != 0 && stream_of(reinterpret_cast<cudaStream_t>(s)).capture == capture;
  return *status = on ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
API CUresult cuStreamGetCaptureInfo_v2(CUstream s, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                       const CUgraphNode**, size_t*) {
  unsigned long long number = 0;
  cudaStreamCaptureStatus found;
  cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(s), &found, &number, reinterpret_cast<cudaGraph_t*>(graph),
                           nullptr, nullptr, nullptr);
  if (id != nullptr) *id = number;
  return *status = static_cast<CUstreamCaptureStatus>(found), CUDA_SUCCESS;
}
// A user object is a shared pointer with its destructor; the handle is the creator's reference, the only one.
API CUresult cuUserObjectCreate(CUuserObject* object, void* p, CUhostFn destroy, unsigned references, unsigned flags) {
  if (references != 1 || flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC) return CUDA_ERROR_INVALID_VALUE;
  return *object = reinterpret_cast<CUuserObject>(new std::shared_ptr<void>(p, destroy)), CUDA_SUCCESS;
}
API CUresult cuUserObjectRelease(CUuserObject object, unsigned references) {
  if (references != 1) return CUDA_ERROR_INVALID_VALUE;
  return delete reinterpret_cast<std::shared_ptr<void>*>(object), CUDA_SUCCESS;
}
API CUresult cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned references, unsigned flags) {
  if (references != 1) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Graph*>(graph)->held.push_back(*reinterpret_cast<std::shared_ptr<void>*>(object));
  return flags == CU_GRAPH_USER_OBJECT_MOVE ? cuUserObjectRelease(object, 1) : CUDA_SUCCESS;
}
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxPushCurrent_v2)
SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetCacheConfig)

// Tensor maps, by the rules of the driver's manual.
namespace {

int bytes_of(CUtensorMapDataType t) {
  switch (t) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, unsigned rank, void* p, const cuuint64_t* dim,
                const cuuint64_t* stride, const cuuint32_t* steps, CUtensorMapSwizzle swizzle, cuuint32_t inner,
                bool box_fits) {
  bool fits = box_fits && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  fits = fits && rank >= 1 && rank <= 5 && kind_of(p) == cudaMemoryTypeDevice;
  for (unsigned i = 0; fits && i < rank; ++i) {
    fits = dim[i] >= 1 && dim[i] <= (cuuint64_t(1) << 32) && steps[i] >= 1 && steps[i] <= 8;
    if (i > 0) fits = fits && stride[i - 1] % 16 == 0 && stride[i - 1] < (cuuint64_t(1) << 40);
  }
  const unsigned row = inner * bytes_of(type), wide[] = {1u << 30, 32, 64, 128};
  if (!fits || row % 16 != 0 || row > wide[std::min(int(swizzle), 3)]) {
    failed(cudaErrorInvalidValue, "a tensor map that the driver's manual does not allow");
    return CUDA_ERROR_INVALID_VALUE;
  }
  ++descriptors;
  return *map = {}, CUDA_SUCCESS;
}

}  // namespace
API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* p,
                                    const cuuint64_t* dim, const cuuint64_t* stride, const cuuint32_t* box,
                                    const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool fits = std::all_of(box, box + rank, [](cuuint32_t side) { return side >= 1 && side <= 256; });
  return encode(map, type, rank, p, dim, stride, steps, swizzle, box[0], fits);
}
API CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* p,
                                     const cuuint64_t* dim, const cuuint64_t* stride, const int* lower,
                                     const int* upper, cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                                     CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                     CUtensorMapFloatOOBfill) {
  const int bound = rank == 3 ? 32768 : rank == 4 ? 128 : 16;
  bool fits = rank >= 3 && channels >= 1 && channels <= 256 && pixels >= 1 && pixels <= 1024;
  for (unsigned i = 0; fits && i < rank - 2; ++i) {
    for (const int corner : {lower[i], upper[i]}) fits = fits && corner >= -bound && corner < bound;
    fits = fits && static_cast<long long>(dim[i + 1]) + upper[i] - lower[i] > 0;
  }
  return encode(map, type, rank, p, dim, stride, steps, swizzle, channels, fits);
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (result != nullptr) *result = *f != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f != nullptr ? cudaSuccess : cudaErrorSymbolNotFound;
}
API CUresult cuGetProcAddress_v2(const char* name, void** f, int, cuuint64_t, CUdriverProcAddressQueryResult*) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, 0, nullptr) ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

// cuBLAS: products are launches that are counted, on the stream of their handle, which is what a handle
// holds. cublasLt asks no handle: its products are given their stream.
#define PRODUCT(name) \
  API int name(const cudaStream_t* handle, ...) { return launch(#name, {1}, {1}, 0, 0, *handle); }
#define HANDLE(name) \
  API int name(void** handle, ...) { return *handle = std::calloc(1, 256), 0; }
API int cublasSetStream_v2(cudaStream_t* handle, cudaStream_t s) { return *handle = s, 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* n) {
  return std::memset(result, 0, 64), *n = 1, 0;
}
API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                       void*, void*, const void*, void*, size_t, cudaStream_t s) {
  return launch("cublasLtMatmul", {1}, {1}, 0, 0, s);
}
HANDLE(cublasCreate_v2)
HANDLE(cublasLtCreate)
HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
HANDLE(cublasLtMatrixLayoutCreate)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
