#pragma once

// GradVac in Gram space (Wang et al. 2021, arXiv 2010.05874, Algorithm 1): PCGrad with a target r_ij for the
// cosine of every two tasks. With g = J'c_i, c_i = e_i at first, each task j != i is met once: c = cos(g,
// g_j); where c < r_ij, g_j times ||g|| (r sqrt(1 - c^2) - c sqrt(1 - r^2)) / (n_j sqrt(1 - r^2)) is added,
// which brings the cosine to r_ij; then r_ij <- (1 - beta) r_ij + beta c, in any case. w = sum_i c_i.
//   options: {random order (0/1), mean over the active tasks (0/1), beta}
//   rng: {seed, step}, read only when the order is random; see surgery.h
//   state: r_ij by rows, in [-1, 1]
//   certificate: {0, 0}
// A cosine is none where a row is zero, or where g has cancelled to rounding, 4 n eps of the lengths that
// were added up: nothing is added then, and r_ij stays. So does every r_ij of a task that is not active. No
// finite multiple of g_j brings the cosine to 1: for r_ij above 1 - 16 eps none is added.

#include "mtl_kernels/solver.h"
#include "mtl_kernels/surgery.h"

namespace mtl {

struct Gradvac {
  static constexpr const char* name = "gradvac";
  static constexpr int num_options = 3;
  MTL_HD static bool needs_rng(const double* options) { return options[0] != 0.0; }

  static constexpr bool independent_rows = true;

  // The coefficients c_ij (131 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks) * static_cast<std::size_t>(num_tasks);
  }
  MTL_HD static constexpr std::size_t state_doubles(int num_tasks) { return scratch_doubles(num_tasks); }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    for (int i = team.squad(); i < p.num_tasks; i += team.num_squads()) {
      if (!p.is_active(i)) continue;
      const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(i) * p.num_tasks;
      Passage<Team> passage(team, p, i, needs_rng(p.options));
      Alignment<Team> alignment(p, passage, i, num_active);
      passage.run(num_active - 1, p.scratch + row, alignment);
    }
    team.sync();
    add_up(team, p, p.scratch, p.options[1] != 0.0 ? 1.0 / num_active : 1.0);
    set_certificate(team, p, 0.0, 0);
    team.sync();
  }

 private:
  template <class Team>
  class Alignment {
   public:
    MTL_HD Alignment(const Problem& p, const Passage<Team>& passage, int task, int num_active)
        : p_(p),
          passage_(passage),
          targets_(p.state + static_cast<std::ptrdiff_t>(task) * p.num_tasks),
          rounding_(4.0 * num_active * DBL_EPSILON),
          square_(p.row(task)[task]),
          longest_(square_ > 0.0 ? sqrt(square_) : 0.0) {}

    MTL_HD double operator()(int j, double product) {
      const double other = p_.row(j)[j];
      const double target = passage_.from_owner(passage_.owns(j) ? targets_[j] : 0.0, j);
      if (!(other > 0.0 && square_ > rounding_ * longest_ * longest_)) return 0.0;
      const double length = sqrt(square_), other_length = sqrt(other);
      double cosine = product / length / other_length;
      cosine = cosine < -1.0 ? -1.0 : cosine > 1.0 ? 1.0 : cosine;
      const double beta = p_.options[2];
      if (passage_.owns(j)) targets_[j] = (1.0 - beta) * target + beta * cosine;
      if (!(cosine < target && target <= 1.0 - 16.0 * DBL_EPSILON)) return 0.0;
      // What is orthogonal to g_j stays, and is now sqrt(1 - r^2) of the whole.
      const double grows = (1.0 - cosine) * (1.0 + cosine) / ((1.0 - target) * (1.0 + target));
      const double more = target * (length / other_length) * sqrt(grows) - product / other;
      square_ *= grows;
      longest_ += fabs(more) * other_length;
      return more;
    }

   private:
    const Problem& p_;
    const Passage<Team>& passage_;
    double* targets_;
    double rounding_;
    double square_;   // ||g||^2
    double longest_;  // what it could be: the sum of the lengths that were added
  };
};

}  // namespace mtl
