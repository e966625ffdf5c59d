#pragma once

// The point of least norm in the convex hull of the rows: w = argmin over the simplex of w'Gw (Desideri
// 2012).
//   options: {Frank-Wolfe (0/1), max_iters (0 = 10 K + 40), tol}
//   certificate: {w'Gw - min_j (Gw)_j over active j, iterations}; w'Gw - optimum <= 2 gap
// Exact: the active-set method of Wolfe, "Finding the nearest point in a polytope" (1976), as in arXiv
// 1710.02608, on Gram entries. Frank-Wolfe: Sener & Koltun 2018 (arXiv 1810.04650), Algorithm 2. Both stop
// when gap <= tol * max_j G_jj; the exact solver also stops when no violation exceeds the rounding of (Gw)_j
// and w'Gw. A zero row is itself the answer: w is the vertex on the first one.
//
// The exact solver works on unit rows: with n_i = sqrt(G_ii), C_ij = G_ij / (n_i n_j), a_i = min n / n_i and
// y_i = w_i / a_i the problem is min y'Cy over y >= 0, a'y = 1. No step then depends on the scale of a row,
// and norms may differ by 1e30. M = C + aa' is positive definite on affinely independent rows, and M z = a
// gives the least norm in their affine hull, y = z / a'z.

#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"
#include "mtl_kernels/wolfe.h"

namespace mtl {

struct MinNorm {
  static constexpr const char* name = "min_norm";
  static constexpr int num_options = 3;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }

  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return Wolfe<SerialTeam, false>::scratch_doubles(num_tasks);
  }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const int iterations =
        p.options[0] != 0.0 ? frank_wolfe(team, p, num_active) : exact(team, p, num_active);
    certify(team, p, iterations);
  }

 private:
  MTL_HD static int iteration_cap(const Problem& p, int fallback) {
    const double cap = p.options[1];
    return cap > 0.0 ? (cap < 1e9 ? static_cast<int>(cap) : 1000000000) : fallback;
  }

  template <class Team>
  MTL_HD static void normalize(const Team& team, const Problem& p) {
    double partial = 0.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) partial += p.weights[i];
    const double total = team.sum(partial);
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) p.weights[i] /= total;
    team.sync();
  }

  template <class Team>
  MTL_HD static IndexedValue least_product(const Team& team, const Problem& p, const double* product) {
    IndexedValue least = {0.0, -1};
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
      if (p.is_active(i)) least = lesser(least, {product[i], i});
    }
    return team.argmin(least.value, least.index);
  }

  template <class Team>
  MTL_HD static double dot_weights(const Team& team, const Problem& p, const double* product) {
    double partial = 0.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) partial += p.weights[i] * product[i];
    return team.sum(partial);
  }

  template <class Team>
  MTL_HD static void certify(const Team& team, const Problem& p, int iterations) {
    const double scale = power_of_two_scale(max_active_diagonal(team, p));
    gram_times(team, p, p.weights, scale, p.scratch);
    const double gap = dot_weights(team, p, p.scratch) - least_product(team, p, p.scratch).value;
    set_certificate(team, p, gap > 0.0 ? gap / scale : 0.0, iterations);
    team.sync();
  }

  template <class Team>
  MTL_HD static int exact(const Team& team, const Problem& p, int num_active) {
    IndexedValue shortest = {0.0, -1};
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
      if (p.is_active(i)) shortest = lesser(shortest, {p.row(i)[i], i});
    }
    shortest = team.argmin(shortest.value, shortest.index);
    int iterations = 0;
    if (p.row(shortest.index)[shortest.index] > 0.0) {
      const int cap = iteration_cap(p, 10 * p.num_tasks + 40);
      Wolfe<Team, false> plain(team, p, num_active);
      iterations = plain.start(shortest.index, cap);
      if (iterations < cap && !plain.has_converged())
        iterations = Wolfe<Team, true>(team, p, p.num_tasks).resume(iterations, cap);
      plain.unscale();
    } else {
      for (int i = team.rank(); i < p.num_tasks; i += team.size())
        p.weights[i] = i == shortest.index ? 1.0 : 0.0;
      team.sync();
    }
    normalize(team, p);
    return iterations;
  }

  template <class Team>
  MTL_HD static int frank_wolfe(const Team& team, const Problem& p, int num_active) {
    const double largest = max_active_diagonal(team, p);
    const double scale = power_of_two_scale(largest);
    const double tolerance = p.options[2] * largest * scale;
    const int cap = iteration_cap(p, 10 * p.num_tasks + 40);
    double* product = p.scratch;  // scale * G w
    for (int i = team.rank(); i < p.num_tasks; i += team.size())
      p.weights[i] = p.is_active(i) ? 1.0 / num_active : 0.0;
    team.sync();
    gram_times(team, p, p.weights, scale, product);
    int iterations = 0;
    for (; iterations < cap; ++iterations) {
      const double value = dot_weights(team, p, product);
      const IndexedValue vertex = least_product(team, p, product);
      if (!(value - vertex.value > tolerance)) break;
      const double* row = p.row(vertex.index);
      const double corner = scale * row[vertex.index];
      const double step =
          vertex.value >= corner ? 1.0 : (value - vertex.value) / (value - 2.0 * vertex.value + corner);
      team.sync();
      for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
        if (!p.is_active(i)) continue;
        p.weights[i] = (1.0 - step) * p.weights[i] + (i == vertex.index ? step : 0.0);
        product[i] = (1.0 - step) * product[i] + step * scale * row[i];
      }
      team.sync();
    }
    normalize(team, p);
    return iterations;
  }
};

}  // namespace mtl
