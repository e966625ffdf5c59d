#include "runtime.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"
#include "shared_memory.h"

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSharedBytes = 48 << 10, kSharedBytesReserved = 1 << 10;

thread_local cudaError_t last_error = cudaSuccess;

std::mutex limits_mutex;
std::map<const void*, int>& dynamic_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

int dynamic_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const auto found = dynamic_limits().find(kernel);
  return found != dynamic_limits().end() ? found->second : kSharedBytes;
}

char device_context;  // stands for the only one there is
thread_local void* context = nullptr;

int get_context(void** current) {
  *current = context;
  return 0;
}

int set_context(void* wanted) {
  context = wanted;
  return 0;
}

cudaError_t device_error() { return emulation::remember(emulation::options().device_error); }

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// Of a call that belongs to no stream.
cudaError_t capture_error() {
  const bool refused =
      emulation::options().capturing_elsewhere && capture_mode != cudaStreamCaptureModeRelaxed;
  return refused ? emulation::remember(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

}  // namespace

namespace emulation {

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check_launch(const void* kernel, const unsigned (&grid)[3], const unsigned (&block)[3],
                         std::size_t dynamic_shared_bytes) {
  const Options& set = options();
  if (set.device_error != cudaSuccess) return set.device_error;
  if (set.launch_error != cudaSuccess) return set.launch_error;
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  for (const int axis : {0, 1, 2}) {
    if (grid[axis] == 0 || block[axis] == 0) return cudaErrorInvalidConfiguration;
  }
  if (grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) return cudaErrorInvalidConfiguration;
  if (block[0] > kMaxThreads || block[1] > kMaxThreads || block[2] > 64 ||
      std::size_t{block[0]} * block[1] * block[2] > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  const std::size_t fixed = symbols_of(kernel).shared_bytes;
  const auto limit = static_cast<std::size_t>(dynamic_limit(kernel));
  if (dynamic_shared_bytes > limit ||
      (limit <= kSharedBytes && fixed + dynamic_shared_bytes > kSharedBytes) ||
      fixed + dynamic_shared_bytes > static_cast<std::size_t>(set.shared_bytes_opt_in))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(error) \
  case error:       \
    return #error;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidValue)
    NAME(cudaErrorMemoryAllocation)
    NAME(cudaErrorInitializationError)
    NAME(cudaErrorInvalidConfiguration)
    NAME(cudaErrorInsufficientDriver)
    NAME(cudaErrorInvalidDeviceFunction)
    NAME(cudaErrorNoDevice)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorNoKernelImageForDevice)
    NAME(cudaErrorUnsupportedPtxVersion)
    NAME(cudaErrorIllegalAddress)
    NAME(cudaErrorLaunchOutOfResources)
    NAME(cudaErrorLaunchFailure)
    NAME(cudaErrorNotSupported)
    NAME(cudaErrorStreamCaptureUnsupported)
    NAME(cudaErrorUnknown)
#undef NAME
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return device_error();
}

cudaError_t cudaSetDevice(int device) {
  if (device != 0) return emulation::remember(cudaErrorInvalidDevice);
  context = &device_context;
  return device_error();
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *function = std::strcmp(symbol, "cuCtxGetCurrent") == 0   ? reinterpret_cast<void*>(get_context)
              : std::strcmp(symbol, "cuCtxSetCurrent") == 0 ? reinterpret_cast<void*>(set_context)
                                                            : nullptr;
  *result = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulation::options().device_error == cudaSuccess ? 1 : 0;
  return device_error();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulation::Options& set = emulation::options();
  if (device != 0) return emulation::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMaxThreads;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedBytes;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = set.multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = set.compute_capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = set.compute_capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = set.shared_bytes_opt_in + kSharedBytesReserved;
      break;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio:
      *value = set.single_to_double_ratio;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = set.shared_bytes_opt_in;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kSharedBytesReserved;
      break;
    default:
      return emulation::remember(cudaErrorInvalidValue);
  }
  return device_error();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::options().driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  if (const cudaError_t refused = capture_error()) return refused;
  attributes->sharedSizeBytes = emulation::symbols_of(kernel).shared_bytes;
  attributes->maxThreadsPerBlock = kMaxThreads;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = emulation::options().compute_capability;
  attributes->maxDynamicSharedSizeBytes = dynamic_limit(kernel);
  return device_error();
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t refused = capture_error()) return refused;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const auto fixed = static_cast<int>(emulation::symbols_of(kernel).shared_bytes);
    if (value < 0 || value > emulation::options().shared_bytes_opt_in - fixed)
      return emulation::remember(cudaErrorInvalidValue);
    const std::lock_guard<std::mutex> lock(limits_mutex);
    dynamic_limits()[kernel] = value;
  }
  return device_error();
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int block_threads,
                                                          std::size_t dynamic_shared_bytes) {
  *blocks = 0;
  if (const cudaError_t refused = capture_error()) return refused;
  if (block_threads <= 0) return emulation::remember(cudaErrorInvalidValue);
  const bool fits = emulation::check_launch(kernel, {1, 1, 1}, {static_cast<unsigned>(block_threads), 1, 1},
                                            dynamic_shared_bytes) == cudaSuccess;
  if (fits) *blocks = emulation::options().blocks_per_multiprocessor;
  return device_error();
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return device_error(); }

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (const cudaError_t refused = capture_error()) return refused;
  *memory = std::malloc(bytes);
  return device_error();
}

cudaError_t cudaFree(void* memory) {
  if (const cudaError_t refused = capture_error()) return refused;
  std::free(memory);
  return device_error();
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return device_error();
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return device_error(); }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return device_error();
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return device_error();
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  if (bytes > 0) std::memset(to, value, bytes);
  return device_error();
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

// For who has loaded a module of this code, and sees nothing else of it.
extern "C" __attribute__((visibility("default"))) void emulation_set_device(int single_to_double_ratio,
                                                                            int capturing_elsewhere) {
  emulation::options().single_to_double_ratio = single_to_double_ratio;
  emulation::options().capturing_elsewhere = capturing_elsewhere != 0;
}
