#pragma once

// What every solver reads and writes. A solver is a struct with
//   static constexpr const char* name;
//   static constexpr int num_options;
//   static constexpr bool independent_rows;  whether it deals rows to squads, so that a larger team is faster
//   MTL_HD static bool needs_rng(const double* options);
//   MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks);
//   MTL_HD static constexpr std::size_t state_doubles(int num_tasks);  kept between steps; 0: nothing
//   template <class Team> MTL_HD static void solve(const Team& team, const Problem& problem);
// in its own header under solvers/, listed in solvers/all.h.

#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "mtl_kernels/rows.h"
#include "mtl_kernels/team.h"

namespace mtl {

// One K x K problem; every pointer is host or device memory alike.
struct Problem {
  int num_tasks;                // K, 1..kMaxTasks
  const double* gram;           // K*K row-major, symmetric but for solvers that say otherwise
  const unsigned char* active;  // K bools or nullptr = all active
  const std::int64_t* rng;      // {seed, step} or nullptr
  std::int64_t index;           // position in the batch
  const double* options;        // hyper-parameters, in the order the solver header documents
  const double* inputs;         // per-task extra inputs [K] (losses, preference...) or nullptr
  double* state;        // Solver::state_doubles(K) doubles, in and out; left alone where `begin` settles
  double* weights;      // K, out
  double* certificate;  // {gap or residual, iterations}, out
  double* scratch;      // Solver::scratch_doubles(K) doubles

  MTL_HD bool is_active(int task) const { return active == nullptr || active[task] != 0; }
  MTL_HD const double* row(int task) const { return gram + static_cast<std::ptrdiff_t>(task) * num_tasks; }
};

MTL_HD int count_active(const Problem& p) {
  if (p.active == nullptr) return p.num_tasks;
  int count = 0;
  for (int i = 0; i < p.num_tasks; ++i) count += p.is_active(i);
  return count;
}

template <class Team>
MTL_HD void set_certificate(const Team& team, const Problem& p, double gap, int iterations) {
  if (team.rank() == 0) {
    p.certificate[0] = gap;
    p.certificate[1] = iterations;
  }
}

// Settles the problems that are the same for every solver: no active task (all weights 0), or a non-finite
// entry among the active tasks (1/K_active each, so that inf/NaN reaches the gradient). Returns the number of
// active tasks, 0 when settled.
template <class Team>
MTL_HD int begin(const Team& team, const Problem& p) {
  const int num_active = count_active(p);
  bool bad = false;
  for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
    if (!p.is_active(i)) continue;
    const double* row = p.row(i);
    int bad_in_row = 0;
    if (p.active == nullptr) {
      for (int j = 0; j < p.num_tasks; ++j) bad_in_row |= !(fabs(row[j]) <= DBL_MAX);
    } else {
      for (int j = 0; j < p.num_tasks; ++j) bad_in_row |= p.is_active(j) && !(fabs(row[j]) <= DBL_MAX);
    }
    bad = bad || bad_in_row != 0;
  }
  bad = team.any(bad);
  if (num_active > 0 && !bad) return num_active;
  for (int i = team.rank(); i < p.num_tasks; i += team.size())
    p.weights[i] = p.is_active(i) ? 1.0 / num_active : 0.0;
  set_certificate(team, p, bad ? static_cast<double>(NAN) : 0.0, 0);
  team.sync();
  return 0;
}

}  // namespace mtl
