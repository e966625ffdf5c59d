#pragma once

// Weights that take projected gradient steps from one training step to the next, on A = J1 J2' of two
// independent batches: an unbiased estimate of G, which need not be symmetric. A_ij = g1_i . g2_j.
//   state: w, the weights of the last step [K]; all zero: 1 / K each. Only the shares among the active tasks
//     count, and only these change: together they keep what they had, or n / K if that was nothing.
//   certificate: none
//
// Results do not depend on the size of the team: every sum is taken by one rank, in the order of the tasks.

#include "mtl_kernels/simplex.h"
#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"

namespace mtl {

namespace stochastic {

// out_i = scale * sum over active j of A_ij x_j, for every active i.
template <class Team>
MTL_HD void product(const Team& team, const Problem& p, double scale, const double* x, double* out) {
  for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
    if (!p.is_active(i)) continue;
    const double* row = p.row(i);
    double total = 0.0;
    for (int j = 0; j < p.num_tasks; ++j) {
      if (p.is_active(j)) total += scale * row[j] * x[j];
    }
    out[i] = total;
  }
  team.sync();
}

// The weights that go from step to step, among the active tasks.
class Shares {
 public:
  // w <- what each active task has of the state.
  template <class Team>
  MTL_HD Shares(const Team& team, const Problem& p, int num_active, double* w) {
    double all = 0.0;
    for (int i = 0; i < p.num_tasks; ++i) all += p.state[i];
    new_ = !(all > 0.0 && all <= DBL_MAX);
    for (int i = 0; i < p.num_tasks; ++i) {
      if (p.is_active(i) && !new_) total_ += p.state[i];
    }
    const bool equal = !(total_ > 0.0);
    if (equal) total_ = static_cast<double>(num_active) / p.num_tasks;
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      w[i] = !p.is_active(i) ? 0.0 : equal ? 1.0 / num_active : p.state[i] / total_;
    if (num_active == p.num_tasks) total_ = 1.0;
    team.sync();
  }

  template <class Team>
  MTL_HD void store(const Team& team, const Problem& p, const double* w) const {
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
      if (p.is_active(i)) {
        p.state[i] = total_ * w[i];
      } else if (new_) {
        p.state[i] = 1.0 / p.num_tasks;
      }
    }
    team.sync();
  }

 private:
  double total_ = 0.0;
  bool new_ = false;
};

}  // namespace stochastic

// SDMGrad (Xiao et al. 2023, arXiv 2305.18409), for d = sum_i out_i g3_i over a third batch:
//   n_iter times: b <- momentum b + A' (w + lam pref), w <- P(w - lr b), from b = 0; out = (w + lam pref) /
//   (1 + lam); A' = A, or normalised A / (m^2 + 1e-8 max |A_ij|), m the mean of sqrt(max(A_ii, 0)).
//   options: {lam, lr, momentum, n_iter, normalise (0/1)}
//   inputs: pref, >= 0, in proportion over the active tasks; absent or all zero: alike
struct Sdmgrad {
  static constexpr const char* name = "sdmgrad";
  static constexpr int num_options = 5;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks);
  }
  // pref, b, w + lam pref and A' times that.
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return 4 * static_cast<std::size_t>(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const double lam = p.options[0], rate = p.options[1], momentum = p.options[2];
    const int num_iterations = p.options[3] < 1e9 ? static_cast<int>(p.options[3]) : 1000000000;
    double *w = p.weights, *pref = p.scratch, *velocity = pref + p.num_tasks, *mixed = velocity + p.num_tasks,
           *gradient = mixed + p.num_tasks;
    const stochastic::Shares shares(team, p, num_active, w);
    prefer(team, p, num_active, pref);
    double scale = 1.0, divisor = 1.0;
    if (p.options[4] != 0.0) normalise(team, p, num_active, &scale, &divisor);
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) velocity[i] = 0.0;
    for (int iteration = 0; iteration < num_iterations; ++iteration) {
      for (int i = team.rank(); i < p.num_tasks; i += team.size()) mixed[i] = w[i] + lam * pref[i];
      team.sync();
      stochastic::product(team, p, scale, mixed, gradient);
      for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
        if (!p.is_active(i)) continue;
        velocity[i] = momentum * velocity[i] + gradient[i] / divisor;
        w[i] -= rate * velocity[i];
      }
      team.sync();
      project_onto_simplex(team, p, w);
    }
    shares.store(team, p, w);
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) w[i] = (w[i] + lam * pref[i]) / (1.0 + lam);
    set_certificate(team, p, 0.0, num_iterations);
    team.sync();
  }

 private:
  template <class Team>
  MTL_HD static void prefer(const Team& team, const Problem& p, int num_active, double* pref) {
    double total = 0.0;
    for (int i = 0; i < p.num_tasks; ++i) {
      if (p.inputs != nullptr && p.is_active(i)) total += p.inputs[i];
    }
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      pref[i] = !p.is_active(i) ? 0.0 : total > 0.0 ? p.inputs[i] / total : 1.0 / num_active;
    team.sync();
  }

  // A' = scale A / divisor; the scale is a power of two, so that squares of roots stay in range. 1 / 1 for A
  // = 0.
  template <class Team>
  MTL_HD static void normalise(const Team& team, const Problem& p, int num_active, double* scale,
                               double* divisor) {
    double negated = 0.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
      if (!p.is_active(i)) continue;
      for (int j = 0; j < p.num_tasks; ++j) {
        if (p.is_active(j) && -fabs(p.row(i)[j]) < negated) negated = -fabs(p.row(i)[j]);
      }
    }
    const double largest = -team.min(negated);
    if (largest == 0.0) return;
    *scale = power_of_two_scale(largest);
    double roots = 0.0;
    for (int i = 0; i < p.num_tasks; ++i) {
      if (p.is_active(i) && p.row(i)[i] > 0.0) roots += sqrt(*scale * p.row(i)[i]);
    }
    const double mean = roots / num_active;
    *divisor = mean * mean + 1e-8 * (*scale * largest);
  }
};

// MoDo (Chen et al. 2023, arXiv 2305.20057): w <- P(w - gamma (A w + rho w)), once.
//   options: {gamma, rho}
struct Modo {
  static constexpr const char* name = "modo";
  static constexpr int num_options = 2;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }
  MTL_HD static constexpr std::size_t state_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks);
  }
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const double gamma = p.options[0], rho = p.options[1];
    const stochastic::Shares shares(team, p, num_active, p.weights);
    stochastic::product(team, p, 1.0, p.weights, p.scratch);
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
      if (p.is_active(i)) p.weights[i] -= gamma * (p.scratch[i] + rho * p.weights[i]);
    }
    team.sync();
    project_onto_simplex(team, p, p.weights);
    shares.store(team, p, p.weights);
    set_certificate(team, p, 0.0, 1);
    team.sync();
  }
};

}  // namespace mtl
