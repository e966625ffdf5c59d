#pragma once

#include "combine_args.h"
#include "mtl_kernels/rows.h"

namespace mtl::cuda {

// A combine kernel, and how it wants to be launched.
struct CombineKernel {
  void (*run)(CombineArgs);
  int threads;
  std::int64_t step_columns;
  std::int64_t max_steps;
};

// `slow_double`: for a device whose double arithmetic is a small fraction of that in float.
CombineKernel combine_kernel(DType rows, DType output, bool slow_double);

}  // namespace mtl::cuda
