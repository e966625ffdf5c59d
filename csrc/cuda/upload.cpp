#include "upload.h"

namespace mtl::cuda {
namespace {

class OwnStream {
 public:
  OwnStream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  OwnStream(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace

DeviceCopy::DeviceCopy(int device, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  const OwnStream stream;
  check(cudaMalloc(&memory_, bytes), "cudaMalloc");
  cudaError_t status = cudaMemcpyAsync(memory_, from, bytes, cudaMemcpyHostToDevice, stream.get());
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream.get());
  if (status == cudaSuccess) return;
  static_cast<void>(cudaFree(memory_));
  check(status, "copy to the device");
}

// At the end of the process the device may be gone, which is no error.
DeviceCopy::~DeviceCopy() {
  const RelaxedCapture relaxed;
  static_cast<void>(cudaFree(memory_));
}

}  // namespace mtl::cuda
