#pragma once

// ConFIG (Liu et al. 2025, arXiv 2408.11104): with U the unit rows, the direction b = U^+ pref, whose
// cosines with the rows are in the ratio of pref, and d = l b / |b|. In Gram form, with C = UU' and n the
// lengths of the rows: y = C^+ pref, b = U'y, |b|^2 = pref'y, and w_k = l y_k / (|b| n_k). Zero rows are left
// out; w = 0 where b is zero up to rounding.
//   inputs: pref, or nullptr: all ones
//   options: {length, rtol, see unit_rows.h}; length 0: l = sum_k g_k'b / |b|; 1 to 5: l = m sum_k u_k'b /
//     |b|, m the minimum, maximum, harmonic, arithmetic, geometric mean of n
//   certificate: {what Jacobi's method has left off the diagonal of C, relative to C; sweeps}

#include "mtl_kernels/solver.h"
#include "mtl_kernels/unit_rows.h"

namespace mtl {

struct Config {
  static constexpr const char* name = "config";
  static constexpr int num_options = 2;
  static constexpr bool independent_rows = true;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return UnitRows<SerialTeam>::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    if (begin(team, p) == 0) return;
    UnitRows<Team> rows(team, p, p.options[1]);
    const bool found = rows.solve(p.inputs);
    double square = 0.0;  // |b|^2 = y'Cy
    for (int i = 0; i < p.num_tasks; ++i) square += rows.nearest(i) * rows.image(i);
    const double numerator = found && square > 0.0 ? projections(rows, p) / square : 0.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      p.weights[i] = rows.length(i) > 0.0 ? rows.nearest(i) * (numerator / rows.length(i)) : 0.0;
    set_certificate(team, p, rows.residual(), rows.sweeps());
    team.sync();
  }

 private:
  enum Length { kProjection, kMinimum, kMaximum, kHarmonic, kArithmetic, kGeometric };

  // l |b|.
  template <class Team>
  MTL_HD static double projections(const UnitRows<Team>& rows, const Problem& p) {
    const int length = static_cast<int>(p.options[0]);
    double along = 0.0;
    for (int i = 0; i < p.num_tasks; ++i)
      along += rows.image(i) * (length == kProjection ? rows.length(i) : 1.0);
    return length == kProjection ? along : along * mean(rows, p.num_tasks, length);
  }

  template <class Team>
  MTL_HD static double mean(const UnitRows<Team>& rows, int num_tasks, int kind) {
    double least = 0.0, largest = 0.0, inverses = 0.0, sum = 0.0, logarithms = 0.0;
    MTL_NO_UNROLL
    for (int i = 0; i < num_tasks; ++i) {
      const double n = rows.length(i);
      if (!(n > 0.0)) continue;
      least = least == 0.0 || n < least ? n : least;
      largest = n > largest ? n : largest;
      inverses += 1.0 / n;
      sum += n;
      logarithms += kind == kGeometric ? log(n) : 0.0;
    }
    if (kind == kMinimum) return least;
    if (kind == kMaximum) return largest;
    if (kind == kHarmonic) return rows.count() / inverses;
    return kind == kArithmetic ? sum / rows.count() : exp(logarithms / rows.count());
  }
};

}  // namespace mtl
