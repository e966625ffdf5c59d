#pragma once

#include "device.h"
#include "solver_call.h"

namespace mtl::cuda {

struct SolveArgs {
  std::int64_t batch;
  SolverCall call;
};

constexpr int kSolveMaxThreads = 128;

void (*solve_kernel())(SolveArgs);

}  // namespace mtl::cuda
