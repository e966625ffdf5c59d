#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace mtl::cpu {
namespace {

struct FreeAligned {
  void operator()(double* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<double, FreeAligned>;

}  // namespace

double* thread_scratch(std::size_t doubles) {
  thread_local Scratch scratch;
  thread_local std::size_t capacity = 0;
  if (doubles > capacity) {
    const std::size_t bytes = (doubles * sizeof(double) + kCacheLine - 1) / kCacheLine * kCacheLine;
    capacity = 0;
    scratch.reset(static_cast<double*>(std::aligned_alloc(kCacheLine, bytes)));
    if (scratch == nullptr) throw std::bad_alloc();
    capacity = doubles;
  }
  return scratch.get();
}

}  // namespace mtl::cpu
