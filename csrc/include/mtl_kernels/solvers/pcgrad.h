#pragma once

// PCGrad in Gram space (Yu et al. 2020, arXiv 2001.06782, Algorithm 1): with v = G c_i and c_i = e_i at
// first, each task j != i is met once; if v_j < 0: c_ij -= v_j / G_jj. w = sum_i c_i.
//   options: {random order (0/1), mean over the active tasks (0/1)}
//   rng: {seed, step}, read only when the order is random; see surgery.h
//   certificate: {0, 0}
//
// v_j / G_jj overflows where norms differ by more than about 1e308. Weights are then inf or nan: a host
// refuses them, a GPU lets them reach the gradient, where found_inf and checks for finite gradients see them.

#include "mtl_kernels/solver.h"
#include "mtl_kernels/surgery.h"

namespace mtl {

struct Pcgrad {
  static constexpr const char* name = "pcgrad";
  static constexpr int num_options = 2;
  MTL_HD static bool needs_rng(const double* options) { return options[0] != 0.0; }

  static constexpr bool independent_rows = true;

  // The coefficients c_ij (131 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks) * static_cast<std::size_t>(num_tasks);
  }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    for (int i = team.squad(); i < p.num_tasks; i += team.num_squads()) {
      if (!p.is_active(i)) continue;
      Projection projection{p};
      Passage<Team>(team, p, i, needs_rng(p.options))
          .run(num_active - 1, p.scratch + static_cast<std::ptrdiff_t>(i) * p.num_tasks, projection);
    }
    team.sync();
    add_up(team, p, p.scratch, p.options[1] != 0.0 ? 1.0 / num_active : 1.0);
    set_certificate(team, p, 0.0, 0);
    team.sync();
  }

 private:
  struct Projection {
    const Problem& p;

    MTL_HD double operator()(int j, double product) const {
      const double square = p.row(j)[j];
      return product < 0.0 && square > 0.0 ? -(product / square) : 0.0;
    }
  };
};

}  // namespace mtl
