#pragma once

#include "mtl_kernels/rows.h"
#include "state_args.h"

namespace mtl::cuda {

// A kernel that updates the states of rows, and how it wants to be launched.
struct StateKernel {
  void (*run)(StateArgs);
  int threads;
  std::int64_t step_columns;
  std::int64_t max_steps;
};

StateKernel state_kernel(DType rows, DType states, StateOperation operation);

}  // namespace mtl::cuda
