#pragma once

// Finds a solver of all.h by name, on the host, and checks what it is called with.

#include <stdexcept>
#include <string>
#include <vector>

#include "mtl_kernels/solvers/all.h"

namespace mtl {

struct SolverInfo {
  int position = -1;  // in AllSolvers
  std::size_t num_options = 0;
  bool independent_rows = false;
  bool (*needs_rng)(const double*) = nullptr;
  std::size_t (*scratch_doubles)(int) = nullptr;
  std::size_t (*state_doubles)(int) = nullptr;

  bool is_fused() const { return position < FusedSolvers::kSize; }
};

namespace detail {

template <class Solver>
std::size_t scratch_doubles_of(int num_tasks) {
  return Solver::scratch_doubles(num_tasks);
}

template <class Solver>
std::size_t state_doubles_of(int num_tasks) {
  return Solver::state_doubles(num_tasks);
}

template <class Solver>
bool needs_rng_of(const double* options) {
  return Solver::needs_rng(options);
}

template <class... Solvers>
SolverInfo find_solver(const std::string& name, SolverList<Solvers...>) {
  SolverInfo found;
  int position = 0;
  ((name == Solvers::name
        ? void(found = {position, Solvers::num_options, Solvers::independent_rows, needs_rng_of<Solvers>,
                        scratch_doubles_of<Solvers>, state_doubles_of<Solvers>})
        : void(),
    ++position),
   ...);
  return found;
}

}  // namespace detail

// Throws std::invalid_argument on an unknown name, a K out of range, the wrong number of options, options
// that need an rng state that is missing, or a state of another size: `state_doubles` of each problem, 0 for
// none.
inline SolverInfo find_solver(const std::string& name, int num_tasks, const std::vector<double>& options,
                              bool has_rng, std::int64_t state_doubles) {
  const SolverInfo solver = detail::find_solver(name, AllSolvers{});
  if (solver.position < 0) throw std::invalid_argument("unknown solver '" + name + "'");
  if (options.size() != solver.num_options) {
    throw std::invalid_argument("solver '" + name + "' takes " + std::to_string(solver.num_options) +
                                " options, found " + std::to_string(options.size()));
  }
  if (!has_rng && solver.needs_rng(options.data()))
    throw std::invalid_argument("solver '" + name + "' needs an rng state with these options");
  if (num_tasks < 1 || num_tasks > kMaxTasks) {
    throw std::invalid_argument("expected 1 to " + std::to_string(kMaxTasks) + " tasks, found " +
                                std::to_string(num_tasks));
  }
  const auto kept = static_cast<std::int64_t>(solver.state_doubles(num_tasks));
  if (state_doubles != kept) {
    throw std::invalid_argument("solver '" + name + "' keeps a state of " + std::to_string(kept) +
                                " numbers for " + std::to_string(num_tasks) + " tasks, found " +
                                std::to_string(state_doubles));
  }
  return solver;
}

}  // namespace mtl
