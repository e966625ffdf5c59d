#pragma once

// Runs a solver of solvers/all.h, by name, over a batch of problems.

#include <cstdint>
#include <string>
#include <vector>

namespace mtl::cpu {

// gram [batch, K, K], weights [batch, K], certificate [batch, 2], all contiguous. `active` and `inputs` may
// be null; their stride between problems is 0 (shared) or K; `certificate` may be null where it is not
// wanted; state [batch, state_doubles]. Throws std::invalid_argument as find_solver does, and where weights
// are not finite although G is; the state is then as it was.
void solve(const std::string& name, std::int64_t batch, int num_tasks, const double* gram,
           const unsigned char* active, std::int64_t active_stride, const std::int64_t* rng,
           const std::vector<double>& options, const double* inputs, std::int64_t inputs_stride,
           double* state, std::int64_t state_doubles, double* weights, double* certificate, int threads);

}  // namespace mtl::cpu
