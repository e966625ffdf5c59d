#pragma once

// Runs a solver of solvers/all.h, by name, over a batch of problems.

#include <cstdint>
#include <string>
#include <vector>

namespace mtl::cpu {

// gram [batch, K, K], weights [batch, K], certificate [batch, 2], all contiguous. `active` and `inputs` may
// be null; their stride between problems is 0 (shared) or K; `certificate` may be null where it is not
// wanted. Throws std::invalid_argument on an unknown name, a K out of range, the wrong number of options,
// options that need an rng state that is missing, or weights that are not finite although G is.
void solve(const std::string& name, std::int64_t batch, int num_tasks, const double* gram,
           const unsigned char* active, std::int64_t active_stride, const std::int64_t* rng,
           const std::vector<double>& options, const double* inputs, std::int64_t inputs_stride,
           double* weights, double* certificate, int threads);

}  // namespace mtl::cpu
