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

namespace mtl {

struct MinNorm {
  static constexpr const char* name = "min_norm";
  static constexpr int num_options = 3;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }

  // The factor, seven vectors of the exact solver, and two of int (75 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return PackedCholesky::doubles(num_tasks) + std::size_t{9} * static_cast<std::size_t>(num_tasks);
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const int iterations =
        p.options[0] != 0.0 ? frank_wolfe(team, p, num_active) : Wolfe<Team>(team, p, num_active).run();
    certify(team, p, iterations);
  }

 private:
  MTL_HD static int iteration_cap(const Problem& p, int fallback) {
    const double cap = p.options[1];
    return cap > 0.0 ? (cap < 1e9 ? static_cast<int>(cap) : 1000000000) : fallback;
  }

  template <class Team>
  MTL_HD static void set_vertex(const Team& team, const Problem& p, int vertex) {
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) p.weights[i] = i == vertex ? 1.0 : 0.0;
    team.sync();
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

  template <class Team>
  class Wolfe {
   public:
    MTL_HD Wolfe(const Team& team, const Problem& p, int num_active)
        : team_(team), p_(p), num_tasks_(p.num_tasks), factor_{p.scratch, p.num_tasks} {
      double* next = p.scratch + PackedCholesky::doubles(num_tasks_);
      double** vectors[] = {&inverse_norm_, &a_, &y_, &target_, &product_, &column_, &forward_};
      for (double** vector : vectors) {
        *vector = next;
        next += num_tasks_;
      }
      support_ = reinterpret_cast<int*>(next);
      state_ = support_ + num_tasks_;
      best_ = p.weights;
      rounding_ = 2.0 * DBL_EPSILON * num_active;
      floor_ = 4.0 * DBL_EPSILON * num_active;
    }

    // Returns the number of rows that entered the support.
    MTL_HD int run() {
      const IndexedValue start = least_diagonal();
      if (p_.row(start.index)[start.index] <= 0.0) {
        set_vertex(team_, p_, start.index);
        return 0;
      }
      initialize(start.index);
      const int cap = iteration_cap(p_, 10 * num_tasks_ + 40);
      int iterations = 0;
      double best_value = evaluate();
      double best_length = length_;
      save();
      while (iterations < cap) {
        const int entering = find_violation(best_value);
        if (entering < 0) break;
        ++iterations;
        improve_with(entering);
        const double value = evaluate();
        // A long row can matter through a weight too small to show in w'Gw: what changes nothing is kept, but
        // a row may enter once only until w'Gw falls by more than its rounding, so that rounding cannot make
        // a cycle.
        const double shorter = length_ < best_length ? length_ : best_length;
        const double noise = rounding_ * shorter * shorter;
        if (value <= best_value + noise) {
          if (value < best_value - noise) forget_entries();
          best_value = value < best_value ? value : best_value;
          best_length = length_;
          save();
        } else {
          restore();
          evaluate();
        }
      }
      finish();
      return iterations;
    }

   private:
    enum State : int { kInSupport = 1, kEntered = 2 };  // bits; kEntered: since w'Gw last fell

    MTL_HD IndexedValue least_diagonal() const {
      IndexedValue least = {0.0, -1};
      for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
        if (p_.is_active(i)) least = lesser(least, {p_.row(i)[i], i});
      }
      return team_.argmin(least.value, least.index);
    }

    MTL_HD void initialize(int vertex) {
      const double least_norm = sqrt(p_.row(vertex)[vertex]);
      double least = 1.0;
      for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
        inverse_norm_[i] = p_.is_active(i) ? 1.0 / sqrt(p_.row(i)[i]) : 0.0;
        a_[i] = inverse_norm_[i] * least_norm;
        if (p_.is_active(i) && a_[i] < least) least = a_[i];
        y_[i] = 0.0;
        state_[i] = 0;
      }
      least_a_ = team_.min(least);
      team_.sync();
      if (team_.rank() == 0) {
        y_[vertex] = 1.0 / a_[vertex];
        state_[vertex] = kInSupport;
        support_[0] = vertex;
      }
      team_.sync();
      size_ = 0;
      append(vertex);
    }

    MTL_HD double entry(int i, int j) const {  // M_ij
      return p_.row(i)[j] * inverse_norm_[i] * inverse_norm_[j] + a_[i] * a_[j];
    }

    // Factors support_[size_], which must already be there. Returns whether it is independent of those before
    // it.
    MTL_HD bool append(int task) {
      const int n = size_++;
      for (int k = team_.rank(); k < n; k += team_.size()) column_[k] = entry(support_[k], task);
      team_.sync();
      const double pivot = factor_.append(team_, n, column_, entry(task, task), floor_);
      double partial = 0.0;
      for (int k = team_.rank(); k < n; k += team_.size()) partial += column_[k] * forward_[k];
      const double total = team_.sum(partial);
      if (team_.rank() == 0) forward_[n] = (a_[task] - total) / factor_.at(n)[n];
      team_.sync();
      return pivot > floor_;
    }

    MTL_HD bool factor_from(int position) {
      const int n = size_;
      size_ = position;
      bool independent = true;
      while (size_ < n) independent = append(support_[size_]);
      return independent;
    }

    // product_ = C y; returns y'Cy.
    MTL_HD double evaluate() {
      for (int k = team_.rank(); k < size_; k += team_.size())
        column_[k] = y_[support_[k]] * inverse_norm_[support_[k]];
      team_.sync();
      for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
        double total = 0.0;
        for (int k = 0; k < size_; ++k) total += p_.row(support_[k])[j] * column_[k];
        product_[j] = total * inverse_norm_[j];
      }
      team_.sync();
      double value = 0.0;
      double length = 0.0;
      for (int k = team_.rank(); k < size_; k += team_.size()) {
        value += y_[support_[k]] * product_[support_[k]];
        length += y_[support_[k]];
      }
      length_ = team_.sum(length);
      return team_.sum(value);
    }

    // The task whose (Gw)_j lies furthest below w'Gw, relative to its norm; -1 when none does by more than
    // rounding.
    MTL_HD int find_violation(double value) const {
      IndexedValue worst = {0.0, -1};
      double negated_gap = 0.0;
      for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
        if (!p_.is_active(j) || state_[j] != 0) continue;
        const double residual = product_[j] - a_[j] * value;
        if (residual >= -rounding_ * length_ * (1.0 + a_[j] * length_)) continue;
        worst = lesser(worst, {residual, j});
        if (residual / a_[j] < negated_gap) negated_gap = residual / a_[j];
      }
      const double gap = -team_.min(negated_gap);  // in units of min n^2
      worst = team_.argmin(worst.value, worst.index);
      return gap * least_a_ * least_a_ <= p_.options[2] ? -1 : worst.index;
    }

    // A major cycle: adds a row, then moves to the least norm of the affine hull, dropping the rows whose y
    // would turn negative on the way. A numerically dependent row has no such point: the norm falls along the
    // kernel direction of M until a row leaves.
    MTL_HD void improve_with(int entering) {
      if (team_.rank() == 0) {
        support_[size_] = entering;
        state_[entering] |= kInSupport | kEntered;
      }
      team_.sync();
      bool independent = append(entering);
      for (;;) {
        const bool along_kernel = !independent && support_[size_ - 1] == entering;
        if (along_kernel) {
          find_kernel();
        } else {
          find_minimizer();
        }
        const IndexedValue leaving = first_to_leave(along_kernel);
        for (int k = team_.rank(); k < size_; k += team_.size()) {
          const double y = y_[support_[k]];
          double moved = target_[k];
          if (leaving.index >= 0) moved = y + leaving.value * (along_kernel ? moved : moved - y);
          y_[support_[k]] = moved > 0.0 && k != leaving.index ? moved : 0.0;
        }
        team_.sync();
        if (along_kernel) rescale();
        if (leaving.index < 0) return;
        remove(leaving.index);
        independent = factor_from(leaving.index);
      }
    }

    // target_ = M^-1 a / (a' M^-1 a) on the support.
    MTL_HD void find_minimizer() {
      for (int k = team_.rank(); k < size_; k += team_.size()) target_[k] = forward_[k];
      team_.sync();
      factor_.back_substitute(team_, size_, target_);
      double partial = 0.0;
      for (int k = team_.rank(); k < size_; k += team_.size()) partial += a_[support_[k]] * target_[k];
      const double total = team_.sum(partial);
      for (int k = team_.rank(); k < size_; k += team_.size()) target_[k] /= total;
      team_.sync();
    }

    // target_ = (-M_SS^-1 M_Sj, 1) for the last row j of the support.
    MTL_HD void find_kernel() {
      const int last = size_ - 1;
      for (int k = team_.rank(); k < size_; k += team_.size())
        target_[k] = k < last ? -factor_.at(k)[last] : 1.0;
      team_.sync();
      factor_.back_substitute(team_, last, target_);
    }

    // Position in the support of the first y to reach 0, and the step at which it does; index -1 when none
    // does.
    MTL_HD IndexedValue first_to_leave(bool along_kernel) const {
      IndexedValue first = {0.0, -1};
      for (int k = team_.rank(); k < size_; k += team_.size()) {
        if (along_kernel ? target_[k] >= 0.0 : target_[k] > 0.0) continue;
        const double y = y_[support_[k]];
        const double step = y > 0.0 ? y / (along_kernel ? -target_[k] : y - target_[k]) : 0.0;
        first = lesser(first, {step, k});
      }
      return team_.argmin(first.value, first.index);
    }

    MTL_HD void rescale() {
      double partial = 0.0;
      for (int k = team_.rank(); k < size_; k += team_.size()) partial += a_[support_[k]] * y_[support_[k]];
      const double total = team_.sum(partial);
      for (int k = team_.rank(); k < size_; k += team_.size()) y_[support_[k]] /= total;
      team_.sync();
    }

    MTL_HD void remove(int position) {
      if (team_.rank() == 0) {
        state_[support_[position]] &= ~kInSupport;
        for (int k = position; k + 1 < size_; ++k) support_[k] = support_[k + 1];
      }
      --size_;
      team_.sync();
    }

    MTL_HD void save() {
      for (int i = team_.rank(); i < num_tasks_; i += team_.size()) best_[i] = y_[i];
      team_.sync();
    }

    MTL_HD void restore() {
      int size = 0;
      for (int i = 0; i < num_tasks_; ++i) {
        const bool inside = best_[i] > 0.0;
        if (i % team_.size() == team_.rank()) {
          y_[i] = best_[i];
          state_[i] = (state_[i] & kEntered) | (inside ? kInSupport : 0);
          if (inside) support_[size] = i;
        }
        size += inside;
      }
      team_.sync();
      size_ = size;
      factor_from(0);
    }

    MTL_HD void forget_entries() {
      for (int i = team_.rank(); i < num_tasks_; i += team_.size()) state_[i] &= ~kEntered;
      team_.sync();
    }

    // w = a y, on the simplex to the last bit that a division leaves.
    MTL_HD void finish() {
      for (int i = team_.rank(); i < num_tasks_; i += team_.size())
        p_.weights[i] = best_[i] > 0.0 ? best_[i] * a_[i] : 0.0;
      team_.sync();
      normalize(team_, p_);
    }

    const Team& team_;
    const Problem& p_;
    int num_tasks_;
    PackedCholesky factor_;
    double *inverse_norm_, *a_, *y_, *target_, *product_, *column_, *forward_;
    double* best_;
    int* support_;
    int* state_;
    int size_ = 0;
    double length_ = 0.0;
    double least_a_ = 0.0;
    double rounding_, floor_;
  };
};

}  // namespace mtl
