#pragma once

// The Euclidean projection onto the simplex over the active tasks, without sorting.

#include "mtl_kernels/solver.h"

namespace mtl {

// x <- argmin over {w >= 0, sum w = 1} of |w - x|, which is max(x_i - t, 0). Among the sets {j: x_j >= x_i},
// S the sum of one and n its number, t is the largest (S - 1) / n. Entries are taken relative to the largest
// one, so that large ones do not hide the 1. x_i = 0 for tasks that are not active; team-wide, and the same
// bits for any size of the team.
template <class Team>
MTL_HD void project_onto_simplex(const Team& team, const Problem& p, double* x) {
  IndexedValue negated = {0.0, -1};
  for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
    if (p.is_active(i)) negated = lesser(negated, {-x[i], i});
  }
  const double largest = -team.argmin(negated.value, negated.index).value;
  double threshold = 1.0;  // -t, which is at most 1: the largest entry is 0
  for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
    if (!p.is_active(i)) continue;
    double sum = 0.0;
    int count = 0;
    for (int j = 0; j < p.num_tasks; ++j) {
      if (!p.is_active(j) || x[j] < x[i]) continue;
      sum += x[j] - largest;
      ++count;
    }
    const double other = (1.0 - sum) / count;
    if (other < threshold) threshold = other;
  }
  threshold = team.min(threshold);
  for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
    const double above = x[i] - largest + threshold;
    x[i] = p.is_active(i) && above > 0.0 ? above : 0.0;
  }
  team.sync();
}

}  // namespace mtl
