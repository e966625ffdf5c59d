#pragma once

// The exact solver of solvers/min_norm.h, which has the derivation: the active-set method of Wolfe on unit
// rows.
//
// It descends twice at most. First with plain sums, whose rounding the tests for progress must allow for.
// Rows that nearly cancel make M ill-conditioned and y'Cy so small that all progress may be less than that;
// what is left then shows in the residuals (C y)_j - a_j y'Cy. If it does, the method goes on from there
// refined: C y in compensated sums, so that y'Cy is known up to the rounding of y; and a step to the
// minimizer is one of Newton's method from where y is, with M + mu I for M. That matrix is positive definite
// whatever rounding made of G, and mu no more than M's own rounding: a direction that it slows down is one in
// which y'Cy has next to nothing left to fall. What is left then is the rounding of y and of G.

#include "mtl_kernels/compensated.h"
#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"
#include "mtl_kernels/support.h"

namespace mtl {

template <class Team, bool kRefined>
class Wolfe {
 public:
  // The factor, seven vectors, and two of int (75 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return PackedCholesky::doubles(num_tasks) + std::size_t{8} * static_cast<std::size_t>(num_tasks);
  }

  MTL_HD Wolfe(const Team& team, const Problem& p, int num_active)
      : team_(team),
        p_(p),
        num_tasks_(p.num_tasks),
        num_active_(num_active),
        factor_{opaque(p.scratch), p.num_tasks},
        support_(team, p.num_tasks,
                 factor_.data + PackedCholesky::doubles(p.num_tasks) + std::ptrdiff_t{7} * p.num_tasks) {
    double* next = factor_.data + PackedCholesky::doubles(num_tasks_);
    double** vectors[] = {&inverse_norm_, &a_, &y_, &target_, &product_, &column_, &forward_};
    for (double** vector : vectors) {
      *vector = next;
      next += num_tasks_;
    }
    best_ = p.weights;
  }

  // The first descent, from the vertex on the shortest row. Leaves the best y in p.weights; returns the
  // number of rows that entered the support, at most `cap`.
  MTL_HD int start(int shortest, int cap) {
    const double least_norm = sqrt(p_.row(shortest)[shortest]);
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      inverse_norm_[i] = p_.is_active(i) ? 1.0 / sqrt(p_.row(i)[i]) : 0.0;
      a_[i] = inverse_norm_[i] * least_norm;
    }
    clear();
    if (team_.rank() == 0) y_[shortest] = 1.0 / a_[shortest];
    support_.enter(shortest, Rows::kInside);
    append(0);
    return descend(0, cap);
  }

  // Whether the residuals that the descent has left may be all rounding.
  MTL_HD bool has_converged() const { return find_violation(value_, 4.0 * DBL_EPSILON, 0) < 0; }

  // Another descent, from the y that the first one left in p.weights, and with its norms.
  MTL_HD int resume(int iterations, int cap) {
    clear();
    restore();
    return descend(iterations, cap);
  }

  // p.weights: from y to w, but for its sum.
  MTL_HD void unscale() {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size())
      best_[i] = best_[i] > 0.0 ? best_[i] * a_[i] : 0.0;
    team_.sync();
  }

 private:
  using Rows = Support<Team>;

  // Major cycles, until no row violates the optimality conditions. `best_` is then the best y, and the state
  // is that of it.
  MTL_HD int descend(int iterations, int cap) {
    double best_value = evaluate();
    double best_length = length_;
    save();
    while (iterations < cap) {
      const int entering = find_violation(best_value, rounding(), Rows::kInside | Rows::kEntered);
      if (entering < 0) break;
      ++iterations;
      improve_with(entering);
      const double value = evaluate();
      // A long row can matter through a weight too small to show in w'Gw: what changes nothing is kept, but
      // a row may enter once only until w'Gw falls by more than its rounding, so that rounding cannot make
      // a cycle.
      const double shorter = length_ < best_length ? length_ : best_length;
      const double noise = noise_of(best_value, shorter);
      if (value <= best_value + noise) {
        if (value < best_value - noise) support_.forget_entries();
        best_value = value < best_value ? value : best_value;
        best_length = length_;
        save();
      } else {
        restore();
        evaluate();
      }
    }
    return iterations;
  }

  // What rounding leaves of a sum that should be 0, relative to its terms: that of plain sums, or refined
  // that of y alone.
  MTL_HD double rounding() const { return kRefined ? DBL_EPSILON : 2.0 * DBL_EPSILON * num_active_; }
  MTL_HD double noise_of(double value, double length) const {
    return kRefined ? 4.0 * DBL_EPSILON * (fabs(value) + DBL_EPSILON * length * length)
                    : rounding() * length * length;
  }

  MTL_HD void clear() {
    double least = 1.0;
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      if (p_.is_active(i) && a_[i] < least) least = a_[i];
      y_[i] = 0.0;
      support_.set_state(i, 0);
    }
    least_a_ = team_.min(least);
    team_.sync();
  }

  MTL_HD double entry(int i, int j) const {  // M_ij
    return p_.row(i)[j] * inverse_norm_[i] * inverse_norm_[j] + a_[i] * a_[j];
  }

  // Factors the row at place n of the support. Returns whether it is independent of those before it.
  MTL_HD bool append(int n) {
    const int task = support_[n];
    for (int k = team_.rank(); k < n; k += team_.size()) column_[k] = entry(support_[k], task);
    team_.sync();
    const double floor = 4.0 * DBL_EPSILON * num_active_;  // and mu
    const double diagonal = entry(task, task) + (kRefined ? floor : 0.0);
    const double pivot = factor_.append(team_, n, column_, diagonal, floor);
    if constexpr (!kRefined) {
      double partial = 0.0;
      for (int k = team_.rank(); k < n; k += team_.size()) partial += column_[k] * forward_[k];
      const double total = team_.sum(partial);
      if (team_.rank() == 0) forward_[n] = (a_[task] - total) / factor_.at(n)[n];
      team_.sync();
    }
    return kRefined || pivot > floor;
  }

  MTL_HD bool factor_from(int position) {
    bool independent = true;
    for (int n = position; n < support_.size(); ++n) independent = append(n);
    return independent;
  }

  // (C x)_j, for a column_ of x_k / n_k.
  MTL_HD double product_at(int j) const {
    if constexpr (kRefined) {
      CompensatedSum total;
      MTL_NO_UNROLL
      for (int k = 0; k < support_.size(); ++k) total.add_product(p_.row(support_[k])[j], column_[k]);
      return total.value() * inverse_norm_[j];
    } else {
      double total = 0.0;
      for (int k = 0; k < support_.size(); ++k) total += p_.row(support_[k])[j] * column_[k];
      return total * inverse_norm_[j];
    }
  }

  // product_ = C y, for the support alone unless `everywhere`; returns y'Cy.
  MTL_HD double evaluate(bool everywhere = true) {
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      column_[k] = y_[support_[k]] * inverse_norm_[support_[k]];
    team_.sync();
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (everywhere || (support_.state(j) & Rows::kInside) != 0) product_[j] = product_at(j);
    }
    team_.sync();
    double value = 0.0;
    double length = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      value += y_[support_[k]] * product_[support_[k]];
      length += y_[support_[k]];
    }
    length_ = team_.sum(length);
    value_ = team_.sum(value);
    return value_;
  }

  // The task whose (Gw)_j lies furthest below w'Gw, relative to its norm; -1 when none does by more than
  // `rounding`. Those in one of the states `without` do not count.
  MTL_HD int find_violation(double value, double rounding, int without) const {
    IndexedValue worst = {0.0, -1};
    double negated_gap = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (!p_.is_active(j) || (support_.state(j) & without) != 0) continue;
      const double residual = product_[j] - a_[j] * value;
      if (residual >= -rounding * length_ * (1.0 + a_[j] * length_)) continue;
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
    support_.enter(entering);
    bool independent = append(support_.size() - 1);
    for (;;) {
      const bool along_kernel = !independent && support_[support_.size() - 1] == entering;
      if (along_kernel) {
        find_kernel();
      } else {
        find_minimizer();
      }
      const IndexedValue leaving = first_to_leave(along_kernel);
      for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
        const double y = y_[support_[k]];
        double moved = target_[k];
        if (leaving.index >= 0) moved = y + leaving.value * (along_kernel ? moved : moved - y);
        y_[support_[k]] = moved > 0.0 && k != leaving.index ? moved : 0.0;
      }
      team_.sync();
      if (along_kernel) rescale();
      if (leaving.index < 0) return;
      support_.remove(leaving.index);
      independent = factor_from(leaving.index);
      if (kRefined) evaluate(false);
    }
  }

  // target_ = M^-1 a / (a' M^-1 a) on the support. Refined, as y - M^-1 (C y - a y'Cy), of which it is a
  // multiple.
  MTL_HD void find_minimizer() {
    if constexpr (kRefined) {
      for (int k = team_.rank(); k < support_.size(); k += team_.size())
        target_[k] = a_[support_[k]] * value_ - product_[support_[k]];
      team_.sync();
      factor_.forward_substitute(team_, support_.size(), target_);
      factor_.back_substitute(team_, support_.size(), target_);
      for (int k = team_.rank(); k < support_.size(); k += team_.size()) target_[k] += y_[support_[k]];
    } else {
      for (int k = team_.rank(); k < support_.size(); k += team_.size()) target_[k] = forward_[k];
      team_.sync();
      factor_.back_substitute(team_, support_.size(), target_);
    }
    double partial = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      partial += a_[support_[k]] * target_[k];
    const double total = team_.sum(partial);
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) target_[k] /= total;
    team_.sync();
  }

  // target_ = (-M_SS^-1 M_Sj, 1) for the last row j of the support.
  MTL_HD void find_kernel() {
    const int last = support_.size() - 1;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      target_[k] = k < last ? -factor_.at(k)[last] : 1.0;
    team_.sync();
    factor_.back_substitute(team_, last, target_);
  }

  // Position in the support of the first y to reach 0, and the step at which it does; index -1 when none
  // does.
  MTL_HD IndexedValue first_to_leave(bool along_kernel) const {
    IndexedValue first = {0.0, -1};
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      if (along_kernel ? target_[k] >= 0.0 : target_[k] > 0.0) continue;
      const double y = y_[support_[k]];
      const double step = y > 0.0 ? y / (along_kernel ? -target_[k] : y - target_[k]) : 0.0;
      first = lesser(first, {step, k});
    }
    return team_.argmin(first.value, first.index);
  }

  MTL_HD void rescale() {
    double partial = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      partial += a_[support_[k]] * y_[support_[k]];
    const double total = team_.sum(partial);
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) y_[support_[k]] /= total;
    team_.sync();
  }

  MTL_HD void save() {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) best_[i] = y_[i];
    team_.sync();
  }

  MTL_HD void restore() {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) y_[i] = best_[i];
    support_.restore(best_);
    factor_from(0);
  }

  const Team& team_;
  const Problem& p_;
  int num_tasks_, num_active_;
  PackedCholesky factor_;
  Rows support_;
  double *inverse_norm_, *a_, *y_, *target_, *product_, *column_, *forward_;
  double* best_;
  double value_ = 0.0;  // y'Cy and the sum of y, of the last evaluate
  double length_ = 0.0;
  double least_a_ = 0.0;
};

}  // namespace mtl
