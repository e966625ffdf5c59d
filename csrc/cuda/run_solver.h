#pragma once

// The solver headers with the threads of a block as their team.

#include "device.h"
#include "mtl_kernels/solver.h"
#include "mtl_kernels/solvers/all.h"
#include "solver_call.h"
#include "teams.h"

namespace mtl::cuda {

__device__ inline Problem problem_of(const SolverCall& call, std::int64_t index) {
  Problem problem{};
  problem.num_tasks = call.num_tasks;
  problem.gram = call.gram + index * call.num_tasks * call.num_tasks;
  problem.active = call.active == nullptr ? nullptr : call.active + index * call.active_stride;
  problem.rng = call.rng;
  problem.index = index;
  problem.options = call.options;
  problem.inputs = call.inputs == nullptr ? nullptr : call.inputs + index * call.inputs_stride;
  problem.state = call.state == nullptr ? nullptr : call.state + index * call.state_doubles;
  problem.weights = call.weights + index * call.num_tasks;
  problem.certificate = call.certificate + index * 2;
  problem.scratch = call.scratch == nullptr
                        ? reinterpret_cast<double*>(dynamic_shared())
                        : call.scratch + static_cast<std::int64_t>(blockIdx.x) * call.scratch_doubles;
  return problem;
}

// Solves a problem of at most kMostTasks tasks. All threads of the block call it, and return when it is
// solved.
template <class Solver, int kMostTasks>
__device__ void solve_one(const Problem& problem) {
  if constexpr (Solver::independent_rows || kMostTasks > kWarp) {
    Solver::solve(BlockTeam{}, problem);
  } else {
    if (threadIdx.x < kWarp) Solver::solve(WarpTeam{}, problem);
  }
  __syncthreads();
}

// The same for the solver at a position of the list.
template <int kMostTasks, class... Solvers>
__device__ void solve_switch(int solver, const Problem& problem, SolverList<Solvers...>) {
  int position = 0;
  ((solver == position++ ? solve_one<Solvers, kMostTasks>(problem) : void()), ...);
}

}  // namespace mtl::cuda
