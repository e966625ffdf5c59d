#pragma once

// What a device offers a kernel.

#include "device.h"

namespace mtl::cuda {

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether double arithmetic is a small fraction of that in float: half of it on GPUs for computing, a 32nd
// and less on the others.
inline bool has_slow_double(int device) {
  constexpr int kFastRatio = 4;
  return attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio, device) > kFastRatio;
}

// Bytes of dynamic shared memory that a block of the kernel can have on the current device.
template <class Args>
std::size_t dynamic_shared_limit(void (*kernel)(Args), int device) {
  const RelaxedCapture relaxed;  // the kernel may be loaded here
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  const auto room = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return room < attributes.sharedSizeBytes ? 0 : room - attributes.sharedSizeBytes;
}

// Blocks of a kernel that run on the current device at the same time: one wave, in which a persistent grid
// has no tail. Lets the kernel have all the dynamic shared memory there is, always as much, so that threads
// which ask for different sizes do not take it from each other.
template <class Args>
std::int64_t wave(void (*kernel)(Args), int device, int threads, std::size_t shared_bytes) {
  const RelaxedCapture relaxed;
  const auto* address = reinterpret_cast<const void*>(kernel);
  const std::size_t limit = dynamic_shared_limit(kernel, device);
  int blocks = 0;
  if (shared_bytes <= limit) {
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)),
          "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address, threads, shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  }
  if (blocks == 0) {
    throw std::runtime_error("a kernel of mtl_kernels needs " + std::to_string(shared_bytes) +
                             " bytes of shared memory, and this device has " + std::to_string(limit) +
                             " for it; use backend='triton'");
  }
  return static_cast<std::int64_t>(blocks) * attribute(cudaDevAttrMultiProcessorCount, device);
}

}  // namespace mtl::cuda
