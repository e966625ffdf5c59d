#pragma once

// What a device offers a kernel.

#include "device.h"

namespace mtl::cuda {

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Blocks of a kernel that run on the current device at the same time: one wave, in which a persistent grid
// has no tail. Lets the kernel have so much dynamic shared memory.
template <class Args>
std::int64_t wave(void (*kernel)(Args), int device, int threads, std::size_t shared_bytes) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  }
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (blocks == 0)
    throw std::runtime_error("a kernel of mtl_kernels does not fit this device; use backend='triton'");
  return static_cast<std::int64_t>(blocks) * attribute(cudaDevAttrMultiProcessorCount, device);
}

}  // namespace mtl::cuda
