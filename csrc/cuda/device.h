#pragma once

// The CUDA language and runtime as the sources of this folder use them, or, under MTL_EMULATION, the host
// emulation of the tests. No other file includes either.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(MTL_EMULATION)
#include "cuda_emulation.h"
#define __grid_constant__
#else
#include <cuda_runtime.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "expected GPUs of compute capability 8.0 or newer; MTL_KERNELS_CUDA=0 leaves CUDA out"
#endif
#endif

namespace mtl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A failed CUDA call, with what to do about it where that is known.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::string text = std::string(what) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice)
    text +=
        "; rebuild for this GPU: MTL_KERNELS_CUDA_ARCHS=native pip install --no-binary mtl-kernels "
        "mtl-kernels";
  if (status == cudaErrorInsufficientDriver)
    text += "; the NVIDIA driver is older than the CUDA version of this build: update the driver";
  throw std::runtime_error(text);
}

// A function of the driver, or nullptr where there is none. The module is not linked to it.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<Function*>(found) : nullptr;
}

// Makes a device current for a scope, and then again what was: the context rather than the device, because
// making a device current that has none yet would give it one, hundreds of megabytes large.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    static const auto get_context = driver_function<int(void**)>("cuCtxGetCurrent");
    if (get_context != nullptr && get_context(&before_) != 0) before_ = nullptr;
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    static const auto set_context = driver_function<int(void*)>("cuCtxSetCurrent");
    if (set_context != nullptr) set_context(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  void* before_ = nullptr;
};

// Lets this thread do, for a scope, what belongs to no stream that is being captured, by whatever thread.
// Where the mode cannot be changed, what follows says so.
class RelaxedCapture {
 public:
  RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct Launch {
  int blocks;
  int threads;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

template <class Args>
void launch(void (*kernel)(Args), const Launch& where, Args args, const char* name) {
#if defined(MTL_EMULATION)
  check(emulated_launch(kernel, dim3(where.blocks), dim3(where.threads), where.shared_bytes, where.stream,
                        args),
        name);
#else
  void* pointers[] = {&args};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(where.blocks), dim3(where.threads),
                         pointers, where.shared_bytes, where.stream),
        name);
#endif
}

#if defined(MTL_EMULATION)
inline unsigned char* dynamic_shared() { return emulation::dynamic_shared(); }
#else
// The shared memory whose size a launch names.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char mtl_dynamic_shared[];
  return mtl_dynamic_shared;
}
#endif

}  // namespace mtl::cuda
