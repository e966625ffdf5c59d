#pragma once

// w > 0 with G w = w^(-1/alpha), by fair_newton.h.
//
// nash_mtl: alpha = 1, Nash-MTL (Navon et al. 2022, arXiv 2202.01017).
//   options: {max_norm (0 = any), leave out zero rows (0/1)}
//   state: w of the last problem that had a solution, per task, before the clip
// Where there is no solution, w is the state. Then w is scaled so that ||J'w|| is at most
// max_norm.
//
// fairgrad: FairGrad (Ban & Ji 2024, arXiv 2402.15638).
//   options: {alpha; 0 is the mean}
// Zero rows get weight 0. Where there is no solution, w = 0.
//
//   certificate of both: {max |G w - s| / (s + |G| w) with s = w^(-1/alpha), before the clip, or 1 where
//   there is no solution; iterations}

#include "mtl_kernels/fair_newton.h"

namespace mtl {

struct NashMtl {
  static constexpr const char* name = "nash_mtl";
  static constexpr int num_options = 2;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks);
  }
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return FairNewton<SerialTeam>::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) p.weights[i] = 0.0;
    team.sync();
    FairNewton<Team> newton(team, p, 1.0);
    double square;
    if ((newton.size() == num_active || p.options[1] != 0.0) && newton.solve()) {
      newton.scatter(p.weights);
      newton.scatter(p.state);
      set_certificate(team, p, newton.residual(), newton.iterations());
      square = newton.square();
    } else {
      for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
        if (p.is_active(i)) p.weights[i] = p.state[i];
      }
      set_certificate(team, p, 1.0, newton.iterations());
      team.sync();
      square = square_of(team, p);
    }
    clip(team, p, sqrt(square));
  }

 private:
  template <class Team>
  MTL_HD static double square_of(const Team& team, const Problem& p) {
    const double scale = power_of_two_scale(max_active_diagonal(team, p));
    gram_times(team, p, p.weights, scale, p.scratch);
    double partial = 0.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) partial += p.weights[i] * p.scratch[i];
    return team.sum(partial) / scale;
  }

  template <class Team>
  MTL_HD static void clip(const Team& team, const Problem& p, double norm) {
    const double most = p.options[0];
    if (most > 0.0 && norm > most) {
      for (int i = team.rank(); i < p.num_tasks; i += team.size()) p.weights[i] *= most / norm;
    }
    team.sync();
  }
};

struct FairGrad {
  static constexpr const char* name = "fairgrad";
  static constexpr int num_options = 1;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return FairNewton<SerialTeam>::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const bool mean = p.options[0] == 0.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      p.weights[i] = mean && p.is_active(i) ? 1.0 / num_active : 0.0;
    team.sync();
    if (mean) {
      set_certificate(team, p, 0.0, 0);
    } else {
      FairNewton<Team> newton(team, p, p.options[0]);
      const bool solved = newton.solve();
      if (solved) newton.scatter(p.weights);
      const double residual = solved ? newton.residual() : 1.0;
      set_certificate(team, p, residual, newton.iterations());
    }
    team.sync();
  }
};

}  // namespace mtl
