#pragma once

// Team-parallel linear algebra on matrices of at most kMaxTasks rows.

#include <cstddef>

#include "mtl_kernels/solver.h"

namespace mtl {

// The power of two that brings `x` (finite, >= 0) into [1/2, 1): multiplying by it is exact. 1 for x = 0.
MTL_HD double power_of_two_scale(double x) {
  int exponent = 0;
  if (x > 0.0) frexp(x, &exponent);
  return ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
}

template <class Team>
MTL_HD double max_active_diagonal(const Team& team, const Problem& p) {
  double negated = 0.0;
  for (int i = team.rank(); i < p.num_tasks; i += team.size()) {
    if (p.is_active(i) && -p.row(i)[i] < negated) negated = -p.row(i)[i];
  }
  return -team.min(negated);
}

// out_j = scale * sum over active l of G_lj w_l, for every active j. Reads G by rows of l so that ranks read
// side by side.
template <class Team>
MTL_HD void gram_times(const Team& team, const Problem& p, const double* w, double scale, double* out) {
  for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
    double total = 0.0;
    if (p.is_active(j)) {
      for (int l = 0; l < p.num_tasks; ++l) {
        if (w[l] != 0.0) total += scale * p.row(l)[j] * w[l];
      }
    }
    out[j] = total;
  }
  team.sync();
}

// Upper-triangular factor U of a growing symmetric matrix M = U'U, stored by packed rows: appending solves
// with contiguous updates, and the storage is half of K*K.
struct PackedCholesky {
  double* data;
  int capacity;

  MTL_HD static constexpr std::size_t doubles(int capacity) {
    return static_cast<std::size_t>(capacity) * (static_cast<std::size_t>(capacity) + 1) / 2;
  }
  // at(k)[i] is U_ki, i >= k.
  MTL_HD double* at(int k) const {
    return data + static_cast<std::ptrdiff_t>(k) * (2 * capacity - k - 1) / 2;
  }

  // Appends row/column n. On entry column[0..n) holds M_0n.., on return U_0n..; `diagonal` is M_nn. Returns
  // the pivot U_nn^2 as computed; what is stored is at least `floor`, so that numerically dependent rows
  // cannot divide by zero.
  template <class Team>
  MTL_HD double append(const Team& team, int n, double* column, double diagonal, double floor) const {
    forward_substitute(team, n, column);
    double squares = 0.0;
    for (int k = team.rank(); k < n; k += team.size()) {
      at(k)[n] = column[k];
      squares += column[k] * column[k];
    }
    const double pivot = diagonal - team.sum(squares);
    if (team.rank() == 0) at(n)[n] = sqrt(pivot > floor ? pivot : floor);
    team.sync();
    return pivot;
  }

  // Removes row/column `place` of n, by rotations of the rows behind it. `carry` is scratch for n doubles.
  template <class Team>
  MTL_HD void remove(const Team& team, int n, int place, double* carry) const {
    for (int i = place + team.rank(); i < n - 1; i += team.size()) carry[i] = at(place)[i + 1];
    for (int k = team.rank(); k < place; k += team.size()) {
      for (int i = place; i < n - 1; ++i) at(k)[i] = at(k)[i + 1];
    }
    team.sync();
    for (int k = place; k < n - 1; ++k) {
      const double* below = at(k + 1) + 1;  // below[i] is in column i once `place` is gone
      const double x = carry[k];
      const double y = below[k];
      const double length = hypot(x, y);
      const double cosine = length > 0.0 ? x / length : 1.0;
      const double sine = length > 0.0 ? y / length : 0.0;
      team.sync();
      for (int i = k + team.rank(); i < n - 1; i += team.size()) {
        const double upper = carry[i];
        const double lower = below[i];
        at(k)[i] = cosine * upper + sine * lower;
        carry[i] = cosine * lower - sine * upper;
      }
      team.sync();
    }
  }

  // Factors the n x n matrix whose upper triangle is in place: row k at at(k). Pivots below `floor` count as
  // it.
  template <class Team>
  MTL_HD void factor(const Team& team, int n, double floor) const {
    for (int k = 0; k < n; ++k) {
      double* row = at(k);
      const double root = sqrt(row[k] > floor ? row[k] : floor);
      team.sync();
      for (int i = k + team.rank(); i < n; i += team.size()) row[i] = i == k ? root : row[i] / root;
      team.sync();
      for (int i = k + 1 + team.squad(); i < n; i += team.num_squads()) {
        double* below = at(i);
        const double factor = row[i];
        for (int j = i + team.lane(); j < n; j += Team::kLanes) below[j] -= factor * row[j];
      }
      team.sync();
    }
  }

  // x <- U'^-1 x over the leading n x n block.
  template <class Team>
  MTL_HD void forward_substitute(const Team& team, int n, double* x) const {
    for (int k = 0; k < n; ++k) {
      const double* row = at(k);
      const double xk = x[k] / row[k];
      team.sync();
      for (int i = k + 1 + team.rank(); i < n; i += team.size()) x[i] -= row[i] * xk;
      if (team.rank() == 0) x[k] = xk;
      team.sync();
    }
  }

  // x <- U^-1 x over the leading n x n block.
  template <class Team>
  MTL_HD void back_substitute(const Team& team, int n, double* x) const {
    for (int k = n - 1; k >= 0; --k) {
      const double xk = x[k] / at(k)[k];
      team.sync();
      for (int i = team.rank(); i < k; i += team.size()) x[i] -= at(i)[k] * xk;
      if (team.rank() == 0) x[k] = xk;
      team.sync();
    }
  }
};

// What has to be added to the diagonal of the cosines C_ij = scale G_ij inverse_i inverse_j, of the tasks
// with inverse > 0, for them to be those of rows: `least`, what rounding in float64 makes of them, or as much
// more as the Gram matrix is indefinite by. `column` and the factor are scratch.
template <class Team>
MTL_HD double cosine_rounding(const Team& team, const Problem& p, const double* inverse, double scale,
                              double least, const PackedCholesky& factor, double* column) {
  double ridge = least;
  for (bool definite = false; !definite && ridge < p.num_tasks; ridge *= definite ? 1.0 : 16.0) {
    definite = true;
    int n = 0;
    for (int j = 0; j < p.num_tasks && definite; ++j) {
      if (!(inverse[j] > 0.0)) continue;
      int k = 0;
      for (int i = 0; i < j; ++i) {
        if (!(inverse[i] > 0.0)) continue;
        if (k % team.size() == team.rank()) column[k] = scale * p.row(i)[j] * inverse[i] * inverse[j];
        ++k;
      }
      team.sync();
      definite = factor.append(team, n++, column, 1.0 + ridge, ridge) >= 0.5 * ridge;
    }
  }
  return ridge;
}

}  // namespace mtl
