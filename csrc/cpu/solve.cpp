#include "solve.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "mtl_kernels/solvers/find.h"
#include "parallel.h"

namespace mtl::cpu {
namespace {

// Below this many Gram entries in all, waking other threads costs more than the solves.
constexpr std::int64_t kSerialEntries = 2048;

// A copy with its own scratch, which a thread keeps: problems come by the thousand, one per layer.
template <class Solver>
void solve_one(Problem problem) {
  thread_local std::vector<double> scratch;
  const std::size_t needed = Solver::scratch_doubles(problem.num_tasks);
  if (scratch.size() < needed) scratch.resize(needed);
  problem.scratch = scratch.data();
  Solver::solve(SerialTeam{}, problem);
}

using Solve = void (*)(Problem);

template <class... Solvers>
Solve solve_at(int position, SolverList<Solvers...>) {
  constexpr Solve all[] = {solve_one<Solvers>...};
  return all[position];
}

// A finite Gram matrix whose norms differ by more than a double holds can have weights beyond it. Where G is
// not finite they are: `begin` has seen to it.
void check_weights(const std::string& name, std::int64_t batch, int num_tasks, const double* weights) {
  for (std::int64_t n = 0; n < batch * num_tasks; ++n) {
    if (std::isfinite(weights[n])) continue;
    throw std::invalid_argument("solver '" + name + "' has no finite weights for problem " +
                                std::to_string(n / num_tasks) +
                                " although its Gram matrix is finite: the norms of its rows differ too much "
                                "for float64; scale the losses to similar sizes");
  }
}

}  // namespace

void solve(const std::string& name, std::int64_t batch, int num_tasks, const double* gram,
           const unsigned char* active, std::int64_t active_stride, const std::int64_t* rng,
           const std::vector<double>& options, const double* inputs, std::int64_t inputs_stride,
           double* state, std::int64_t state_doubles, double* weights, double* certificate, int threads) {
  const SolverInfo solver = find_solver(name, num_tasks, options, rng != nullptr, state_doubles);
  const Solve run = solve_at(solver.position, AllSolvers{});
  const std::vector<double> before(state, state + batch * state_doubles);
  const std::int64_t entries = static_cast<std::int64_t>(num_tasks) * num_tasks;
  parallel_for(batch, batch * entries < kSerialEntries ? 1 : threads, [&](std::int64_t index) {
    Problem problem{};
    problem.num_tasks = num_tasks;
    problem.gram = gram + index * entries;
    problem.active = active == nullptr ? nullptr : active + index * active_stride;
    problem.rng = rng;
    problem.index = index;
    problem.options = options.data();
    problem.inputs = inputs == nullptr ? nullptr : inputs + index * inputs_stride;
    problem.state = state + index * state_doubles;
    problem.weights = weights + index * num_tasks;
    double unwanted[2];
    problem.certificate = certificate == nullptr ? unwanted : certificate + index * 2;
    run(problem);
  });
  try {
    check_weights(name, batch, num_tasks, weights);
  } catch (...) {
    std::copy(before.begin(), before.end(), state);
    throw;
  }
}

}  // namespace mtl::cpu
