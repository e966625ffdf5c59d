#pragma once

#include <string>
#include <vector>

#include "device.h"
#include "solver_call.h"

namespace mtl::cuda {

// A solver by name with its arguments, all but the workspace and, after a gram kernel, the Gram matrix.
struct SolverArguments {
  std::string name;
  int num_tasks = 0;
  const double* gram = nullptr;
  const unsigned char* active = nullptr;
  std::int64_t active_stride = 0;
  std::int64_t* rng = nullptr;
  bool advance_rng = false;
  std::vector<double> options;
  const double* inputs = nullptr;
  std::int64_t inputs_stride = 0;
  double* weights = nullptr;      // [batch, K]
  double* certificate = nullptr;  // [batch, 2]
};

// Doubles of workspace a block needs.
std::int64_t scratch_of(const SolverArguments& arguments);

// The kernel argument; `scratch` as there. Throws std::invalid_argument, see find_solver.
SolverCall make_call(const SolverArguments& arguments, double* scratch);

// Doubles of workspace that `solve` needs for a batch: 0 where shared memory has room.
std::int64_t solve_scratch(int device, const SolverArguments& arguments, std::int64_t batch);

// Solves gram [batch, K, K] on the stream. One block a problem.
void solve(int device, const SolverArguments& arguments, std::int64_t batch, double* scratch,
           cudaStream_t stream);

}  // namespace mtl::cuda
