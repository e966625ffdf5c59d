#pragma once

#include "gram_args.h"
#include "mtl_kernels/rows.h"

namespace mtl::cuda {

// A gram kernel, and how it wants to be launched.
struct GramKernel {
  void (*run)(GramArgs);
  int threads;
  std::size_t shared_bytes;   // dynamic, that it cannot do without
  std::int64_t step_columns;  // that a block takes at a time
  std::int64_t max_steps;     // per tile
  std::int64_t long_steps;    // the same where every block has many tiles
};

constexpr int kTriangleTasks = 8;

GramKernel triangle_kernel(DType dtype, int num_tasks, bool slow_double);  // K <= kTriangleTasks
GramKernel tensor_kernel(DType dtype, int num_tasks);                      // K <= kMaxTasks

// `slow_double`: for a device whose double arithmetic is a small fraction of that in float.
inline GramKernel gram_kernel(DType dtype, int num_tasks, bool slow_double) {
  return num_tasks <= kTriangleTasks ? triangle_kernel(dtype, num_tasks, slow_double)
                                     : tensor_kernel(dtype, num_tasks);
}

}  // namespace mtl::cuda
