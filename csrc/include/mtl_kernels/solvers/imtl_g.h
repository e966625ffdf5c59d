#pragma once

// IMTL-G (Liu et al. 2021, "Towards Impartial Multi-task Learning"): d = J'w, sum w = 1, whose projections on
// all unit rows are equal. With C the cosines of the rows and n their lengths: y = C^+ 1, a_k = y_k / n_k,
// w = a / sum a, and u_k'd = 1 / sum a for all k. On independent rows a = G^-1 n. Zero rows have weight 0;
// w = 0 where sum a is zero up to rounding.
//   options: {rtol, see unit_rows.h}
//   certificate: {what Jacobi's method has left off the diagonal of C, relative to C; sweeps}
//
// On dependent rows C^+ and G^+ differ. Where d with equal projections exists, both give its direction; the
// weights from C are those that independent rows have on their way there. Where it does not, C^+ 1 gives
// every task the same say, and G^+ n the longer rows the more. Nor does it matter to C^+ how far the lengths
// are apart.

#include "mtl_kernels/solver.h"
#include "mtl_kernels/unit_rows.h"

namespace mtl {

struct ImtlG {
  static constexpr const char* name = "imtl_g";
  static constexpr int num_options = 1;
  static constexpr bool independent_rows = true;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return UnitRows<SerialTeam>::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    if (begin(team, p) == 0) return;
    UnitRows<Team> rows(team, p, p.options[0]);
    const bool found = rows.solve(nullptr);
    double shortest = 0.0;
    for (int i = 0; i < p.num_tasks; ++i) {
      const double length = rows.length(i);
      if (length > 0.0 && (shortest == 0.0 || length < shortest)) shortest = length;
    }
    double sum = 0.0, size = 0.0;
    for (int i = 0; i < p.num_tasks; ++i) {
      const double a = share(rows, i, shortest);
      sum += a;
      size += fabs(a);
    }
    const bool zero = !found || fabs(sum) <= rows.rounding() * size;
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      p.weights[i] = zero ? 0.0 : share(rows, i, shortest) / sum;
    set_certificate(team, p, rows.residual(), rows.sweeps());
    team.sync();
  }

 private:
  // a_i, but for a factor that keeps it finite.
  template <class Team>
  MTL_HD static double share(const UnitRows<Team>& rows, int i, double shortest) {
    return rows.length(i) > 0.0 ? rows.nearest(i) * (shortest / rows.length(i)) : 0.0;
  }
};

}  // namespace mtl
