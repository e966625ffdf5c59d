#pragma once

#include "combine_args.h"
#include "mtl_kernels/rows.h"

namespace mtl::cuda {

// A kernel that makes one value of the K values of a column, and how it wants to be launched.
struct CombineKernel {
  void (*run)(CombineArgs);
  int threads;
  std::int64_t step_columns;
  std::int64_t max_steps;
  std::size_t shared_bytes = 0;  // dynamic
};

// `slow_double`: for a device whose double arithmetic is a small fraction of that in float.
CombineKernel combine_kernel(DType rows, DType output, bool slow_double);
CombineKernel graddrop_kernel(DType dtype, bool leaks);
CombineKernel trimmed_mean_kernel(DType dtype, int num_tasks);

}  // namespace mtl::cuda
