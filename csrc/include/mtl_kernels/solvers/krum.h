#pragma once

// Krum and Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): the mean of the rows with the nearest
// neighbours. The score of a row is the sum of its n - f - 2 smallest squared distances to others, of n
// active tasks; at least the nearest one counts. The lowest scores are selected, the lower index on a tie.
//   options: {f, number of selected rows}
//   certificate: {0, 0}

#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"

namespace mtl {

struct Krum {
  static constexpr const char* name = "krum";
  static constexpr int num_options = 2;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  // The smallest distances of each row, and the scores.
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks) * (static_cast<std::size_t>(num_tasks) + 1);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const double scale = power_of_two_scale(max_active_diagonal(team, p));
    const int counted = within(num_active - 2.0 - p.options[0], 1, num_active - 1);
    const int selected = within(p.options[1], 1, num_active);
    double* scores = p.scratch + static_cast<std::ptrdiff_t>(p.num_tasks) * p.num_tasks;
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      if (p.is_active(i)) scores[i] = score(p, i, counted, scale);
    team.sync();
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
      int lower = 0;
      for (int j = 0; j < p.num_tasks; ++j) {
        if (p.is_active(i) && p.is_active(j))
          lower += scores[j] < scores[i] || (scores[j] == scores[i] && j < i) ? 1 : 0;
      }
      p.weights[i] = p.is_active(i) && lower < selected ? 1.0 / selected : 0.0;
    }
    set_certificate(team, p, 0.0, 0);
    team.sync();
  }

 private:
  // The lower bound where they cross: of a single task no distance counts.
  MTL_HD static int within(double x, int least, int most) {
    const int low = least < most ? least : most;
    return x <= low ? low : x >= most ? most : static_cast<int>(x);
  }

  MTL_HD static double score(const Problem& p, int i, int counted, double scale) {
    double* nearest = p.scratch + static_cast<std::ptrdiff_t>(i) * p.num_tasks;  // ascending
    int kept = 0;
    for (int j = 0; j < p.num_tasks; ++j) {
      if (j == i || !p.is_active(j) || counted == 0) continue;
      const double between = scale * p.row(i)[i] + scale * p.row(j)[j] - 2.0 * (scale * p.row(i)[j]);
      const double distance = between > 0.0 ? between : 0.0;
      if (kept == counted && !(distance < nearest[kept - 1])) continue;
      int at = kept < counted ? kept++ : kept - 1;
      for (; at > 0 && nearest[at - 1] > distance; --at) nearest[at] = nearest[at - 1];
      nearest[at] = distance;
    }
    double total = 0.0;
    for (int n = 0; n < kept; ++n) total += nearest[n];
    return total;
  }
};

}  // namespace mtl
