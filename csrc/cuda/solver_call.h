#pragma once

#include <cstdint>

namespace mtl::cuda {

constexpr int kMaxOptions = 8;

// A batch of problems of one K; the pointers are device memory, as in mtl::Problem.
struct SolverCall {
  int solver;  // position in AllSolvers, -1 for none
  int num_tasks;
  const double* gram;
  const unsigned char* active;
  std::int64_t active_stride;
  std::int64_t* rng;
  bool advance_rng;  // add one to the step when all problems are solved
  double options[kMaxOptions];
  const double* inputs;
  std::int64_t inputs_stride;
  double* state;
  std::int64_t state_doubles;  // of a problem
  double* weights;
  double* certificate;
  double* scratch;  // `scratch_doubles` for every block of the grid, nullptr: in dynamic shared memory
  std::int64_t scratch_doubles;
};

}  // namespace mtl::cuda
