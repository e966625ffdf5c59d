#pragma once

#include "device.h"
#include "solver_call.h"

namespace mtl::cuda {

struct SolveArgs {
  std::int64_t batch;
  SolverCall call;
};

constexpr int kSolveMaxThreads = 256;

// For the solver at a position of AllSolvers.
void (*solve_kernel(int solver, int num_tasks))(SolveArgs);

}  // namespace mtl::cuda
