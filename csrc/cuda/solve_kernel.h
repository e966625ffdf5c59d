#pragma once

#include "device.h"
#include "solver_call.h"

namespace mtl::cuda {

struct SolveArgs {
  std::int64_t batch;
  SolverCall call;
};

constexpr int kSolveMaxThreads = 256;

void (*solve_kernel(int num_tasks))(SolveArgs);

}  // namespace mtl::cuda
