#pragma once

#include "device.h"

namespace mtl::cuda {

// A copy of host memory on a device, there when the constructor returns. Allowed while a stream is being
// captured into a graph: nothing of it becomes part of the graph. The memory is not from a pool, for memory
// of a graph's pool may have been used, and be written to at every replay, by what was captured before.
class DeviceCopy {
 public:
  DeviceCopy(int device, const void* from, std::size_t bytes);
  ~DeviceCopy();
  DeviceCopy(const DeviceCopy&) = delete;

  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(memory_); }

 private:
  void* memory_ = nullptr;
};

}  // namespace mtl::cuda
