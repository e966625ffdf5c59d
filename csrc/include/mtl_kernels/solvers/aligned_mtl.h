#pragma once

// AlignedMTL (Senushkin et al. 2023, arXiv 2305.19000): G = V S V', and of that the eigenvalues s above
// rtol * max s. w = sqrt(scale) V S^-1/2 V' pref: the weights of J'B, B = sqrt(scale) V S^-1/2 V', which is
// the nearest to J' of the matrices whose singular values are all sqrt(scale). All s zero: w = pref.
//   inputs: pref, or nullptr: 1 / (number of active tasks)
//   options: {scale, rtol}; scale 0: min s, 1: the median of s, of two the lower one, 2: the mean of s.
//     rtol is K eps at least, what the rounding of K rows leaves
//   certificate: {what Jacobi's method has left off the diagonal of G, relative to G; sweeps}
//
// An eigenvalue that passes rtol on its way down takes its direction out of w, and gives the scale to the
// next: w jumps there. That is the method.

#include <cfloat>

#include "mtl_kernels/jacobi.h"
#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"

namespace mtl {

struct AlignedMtl {
  static constexpr const char* name = "aligned_mtl";
  static constexpr int num_options = 2;
  static constexpr bool independent_rows = true;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return Jacobi<SerialTeam>::scratch_doubles(num_tasks) +
           std::size_t{2} * static_cast<std::size_t>(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const int K = p.num_tasks;
    double* pref = p.scratch + Jacobi<Team>::scratch_doubles(K);
    double* coefficients = pref + K;
    for (int i = team.rank(); i < K; i += team.size())
      pref[i] = !p.is_active(i) ? 0.0 : p.inputs == nullptr ? 1.0 / num_active : p.inputs[i];
    Jacobi<Team> jacobi(team, K, p.scratch);
    const double unit = power_of_two_scale(max_active_diagonal(team, p));
    for (int i = team.squad(); i < K; i += team.num_squads()) {
      for (int j = team.lane(); j < K; j += Team::kLanes)
        jacobi.row(i)[j] = p.is_active(i) && p.is_active(j) ? unit * p.row(i)[j] : 0.0;
    }
    const int sweeps = jacobi.run();
    set_certificate(team, p, jacobi.residual(), sweeps);
    const double rounding = num_active * DBL_EPSILON;
    const Kept kept = jacobi.keep_above(p.options[1] > rounding ? p.options[1] : rounding);
    const double scale = scale_of(jacobi, kept, static_cast<int>(p.options[0]));
    jacobi.project(pref, coefficients);
    for (int i = team.rank(); i < K; i += team.size()) {
      if (jacobi.value(i) > 0.0) coefficients[i] *= sqrt(scale / jacobi.value(i));
    }
    team.sync();
    jacobi.combine(coefficients, p.weights);
    for (int i = team.rank(); i < K && kept.count == 0; i += team.size()) p.weights[i] = pref[i];
    team.sync();
  }

 private:
  enum Scale { kMinimum, kMedian, kMean };

  template <class Team>
  MTL_HD static double scale_of(const Jacobi<Team>& jacobi, const Kept& kept, int kind) {
    if (kept.count == 0) return 0.0;
    if (kind == kMedian) return jacobi.ordered_value((kept.count - 1) / 2);
    return kind == kMinimum ? kept.least : kept.sum / kept.count;
  }
};

}  // namespace mtl
