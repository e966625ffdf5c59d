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

// Makes a device current for a scope. Set even where it seems to be: this library's runtime is its own, and
// the context may have been changed by another.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
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
