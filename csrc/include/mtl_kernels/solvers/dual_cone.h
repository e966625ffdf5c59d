#pragma once

// Preferences, brought into the dual cone of the rows, where no row is in conflict with the combination. With
// H = G + reg trace(G) I among the active tasks and p the preferences (inputs; 1 / K_active each without):
// Upgrad (Quinton & Rey 2024, arXiv 2406.16232): w = sum_i w_i, w_i = argmin of v'Hv over v >= p_i e_i.
// Dualproj: w = argmin of v'Hv over v >= p.
//   options: {reg}
//   certificate: {the largest violation of the conditions, of any i; rows that entered a support}
// The conditions are (Hv)_j >= 0, = 0 where v_j > p_j, on unit rows and for a v that sums to 1 in units of
// the norms n of H: (Gw)_j >= -reg trace(G) w_j - violation n_j sum_k n_k w_k. A zero row has nothing to be
// in conflict with: its weight is p_j.
//
// Pcd (Varam & AlHajri 2026, arXiv 2606.29521): the first active task, 1, before the others. With
// a_j = s_j g_j and s_j = 1 / sqrt(vhat_j + eps): the d nearest to a_1 with a_j'd >= tau ||a_j||^2 for all
// others, scaled to the length of g_1.
//   options: {tau, beta, eps}
//   state: {v_j} and {t_j}, 0 at first. A step adds 1 to t_j of the active tasks, and v_j <- beta v_j +
//   (1 - beta) G_jj, vhat_j = v_j / (1 - beta^t_j).
//   certificate: {the largest violation of the conditions, on unit rows and for weights that sum to 1 in
//   units of the norms; rows that entered the support}
// Where no d meets them, w is 1 on the first task alone, and the certificate {the square of a convex
// combination of the other unit rows: no more than rounding, rows that entered}. d = 0 where g_1 = 0, and
// where the nearest d is 0, which takes tau = 0.

#include "mtl_kernels/dual_cone.h"
#include "mtl_kernels/solver.h"

namespace mtl {

namespace detail {

MTL_HD double preference(const Problem& p, int task, int num_active) {
  if (!p.is_active(task)) return 0.0;
  return p.inputs == nullptr ? 1.0 / num_active : p.inputs[task];
}

}  // namespace detail

struct Upgrad {
  static constexpr const char* name = "upgrad";
  static constexpr int num_options = 1;
  static constexpr bool independent_rows = true;
  MTL_HD static bool needs_rng(const double*) { return false; }

  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  // 1.3 MB at K = 128.
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    const auto tasks = static_cast<std::size_t>(num_tasks);
    return ConeRows::doubles(num_tasks) + tasks * tasks + 2 * tasks +
           static_cast<std::size_t>(most_squads(num_tasks)) *
               DualCone<SerialTeam>::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const int num_tasks = p.num_tasks;
    const ConeRows unit(team, p, p.options[0], p.scratch);
    double* parts = p.scratch + ConeRows::doubles(num_tasks);  // row i: n_j (w_ij - p_i e_ij)
    double* violation = parts + static_cast<std::ptrdiff_t>(num_tasks) * num_tasks;
    double* entered = violation + num_tasks;
    double* cones = entered + num_tasks;
    const double rounding = DualCone<Team>::rounding_of(team, p, unit, num_active, cones);
    const int num_squads =
        team.num_squads() < most_squads(num_tasks) ? team.num_squads() : most_squads(num_tasks);
    if (team.squad() < num_squads) {
      double* scratch = cones + team.squad() * static_cast<std::ptrdiff_t>(
                                                   DualCone<SerialTeam>::scratch_doubles(num_tasks));
      for (int i = team.squad(); i < num_tasks; i += num_squads)
        solve_one(team.as_team(), p, unit, i, num_active, rounding, parts, violation, entered, scratch);
    }
    team.sync();
    double negated = 0.0;
    double iterations = 0.0;
    for (int j = team.rank(); j < num_tasks; j += team.size()) {
      double total = 0.0;
      for (int i = 0; i < num_tasks; ++i) total += parts[static_cast<std::ptrdiff_t>(i) * num_tasks + j];
      p.weights[j] = detail::preference(p, j, num_active) + (total > 0.0 ? total / unit.norm[j] : 0.0);
      negated = -violation[j] < negated ? -violation[j] : negated;
      iterations += entered[j];
    }
    negated = team.min(negated);
    set_certificate(team, p, -negated, static_cast<int>(team.sum(iterations)));
    team.sync();
  }

 private:
  MTL_HD static constexpr int most_squads(int num_tasks) { return num_tasks < 16 ? num_tasks : 16; }

  template <class Squad>
  MTL_HD static void solve_one(const Squad& squad, const Problem& p, const ConeRows& unit, int i,
                               int num_active, double rounding, double* parts, double* violation,
                               double* entered, double* scratch) {
    const double length = detail::preference(p, i, num_active) * unit.norm[i];
    double* part = parts + static_cast<std::ptrdiff_t>(i) * p.num_tasks;
    DualCone<Squad> cone(squad, p, unit, rounding, scratch);
    for (int j = squad.rank(); j < p.num_tasks; j += squad.size()) {
      cone.q()[j] = j == i ? 1.0 : 0.0;
      cone.t()[j] = 0.0;
    }
    squad.sync();
    const int iterations = length > 0.0 ? cone.solve(-1) : 0;
    const double residual = length > 0.0 ? cone.residual() : 0.0;
    for (int j = squad.rank(); j < p.num_tasks; j += squad.size())
      part[j] = length > 0.0 ? cone.y()[j] * length : 0.0;
    if (squad.rank() == 0) {
      violation[i] = residual;
      entered[i] = iterations;
    }
    squad.sync();
  }
};

struct Dualproj {
  static constexpr const char* name = "dualproj";
  static constexpr int num_options = 1;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }

  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  // 77 KB at K = 128.
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return ConeRows::doubles(num_tasks) + DualCone<SerialTeam>::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const ConeRows unit(team, p, p.options[0], p.scratch);
    double partial = 0.0;
    for (int j = team.rank(); j < p.num_tasks; j += team.size())
      partial += detail::preference(p, j, num_active) * unit.norm[j];
    const double length = team.sum(partial);
    double* scratch = p.scratch + ConeRows::doubles(p.num_tasks);
    const double rounding = DualCone<Team>::rounding_of(team, p, unit, num_active, scratch);
    DualCone<Team> cone(team, p, unit, rounding, scratch);
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      cone.q()[j] = length > 0.0 ? detail::preference(p, j, num_active) * unit.norm[j] / length : 0.0;
      cone.t()[j] = 0.0;
    }
    team.sync();
    const int iterations = cone.solve(-1);
    const double residual = cone.residual();
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      const double more = cone.y()[j] > 0.0 ? cone.y()[j] * length / unit.norm[j] : 0.0;
      p.weights[j] = detail::preference(p, j, num_active) + more;
    }
    set_certificate(team, p, residual, iterations);
    team.sync();
  }
};

struct Pcd {
  static constexpr const char* name = "pcd";
  static constexpr int num_options = 3;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int num_tasks) {
    return std::size_t{2} * static_cast<std::size_t>(num_tasks);
  }
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return Dualproj::scratch_doubles(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    int first = 0;
    while (!p.is_active(first)) ++first;
    const double tau = p.options[0];
    const ConeRows unit(team, p, 0.0, p.scratch);
    double* scratch = p.scratch + ConeRows::doubles(p.num_tasks);
    const double rounding = DualCone<Team>::rounding_of(team, p, unit, num_active, scratch);
    DualCone<Team> cone(team, p, unit, rounding, scratch);
    double own = 0.0;
    double negated = 0.0;
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      const double length = p.is_active(j) ? next_scale(p, j) * unit.norm[j] : 0.0;
      cone.q()[j] = j == first ? length : 0.0;
      cone.t()[j] = j == first ? 0.0 : tau * length;
      own += cone.q()[j];
      negated = -cone.t()[j] < negated ? -cone.t()[j] : negated;
    }
    const double sum = team.sum(own) - team.min(negated);
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      cone.q()[j] = sum > 0.0 ? cone.q()[j] / sum : 0.0;
      cone.t()[j] = sum > 0.0 ? cone.t()[j] / sum : 0.0;
    }
    team.sync();
    const bool is_zero = !(unit.norm[first] > 0.0);
    const int iterations = is_zero ? 0 : cone.solve(first);
    const double residual = is_zero ? 0.0 : cone.residual();
    const bool is_alone = !is_zero && cone.is_unbounded();
    double square = is_zero || is_alone ? 0.0 : cone.square();
    if (!(square > (tau > 0.0 ? 0.0 : cone.rounding_of_square()))) square = 0.0;
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      p.weights[j] = is_alone && j == first ? 1.0 : 0.0;
      if (square > 0.0 && unit.norm[j] > 0.0)
        p.weights[j] = (cone.q()[j] + cone.y()[j]) / sqrt(square) * (unit.norm[first] / unit.norm[j]);
    }
    set_certificate(team, p, residual, iterations);
    team.sync();
  }

 private:
  // s_j, from the state that the step leaves.
  MTL_HD static double next_scale(const Problem& p, int task) {
    const double beta = p.options[1];
    double* v = p.state + task;
    double* t = v + p.num_tasks;
    *v = beta * *v + (1.0 - beta) * p.row(task)[task];
    *t += 1.0;
    return 1.0 / sqrt(*v / (1.0 - pow(beta, *t)) + p.options[2]);
  }
};

}  // namespace mtl
