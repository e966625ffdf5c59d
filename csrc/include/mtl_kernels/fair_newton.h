#pragma once

// w > 0 with G w = w^(-beta), beta = 1/alpha > 0: the minimizer of the convex potential
//   w'Gw/2 - sum of w^(1-beta) / (1-beta)        (- sum of log w for beta = 1),
// which is bounded below if and only if no convex combination of the rows is zero. Newton's method on unit
// rows: with n the norms, C the cosines and x = n w the equations are C x = s, s_i = a_i x_i^-beta, a_i =
// n_i^(beta-1).
//
// A step solves (S C S + beta I) v = S (s - C x), S = sqrt(x / s), dx = S v: a matrix with no eigenvalue
// below beta. How far a step is good depends on what it is linear in. Of a task that its own weight decides,
// that is x. One that the others decide (x < beta s, the diagonal of S C S less than beta) has its weight
// follow: its step is linear in s, to which C (x + dx) is added up as if it were exact, and x_i = (s_i /
// a_i)^-alpha. Without the second kind, weights that have to fall by many orders of magnitude, as those of a
// large alpha do, would fall by one a step. A step is cut short where x or s would turn negative, then halved
// until the potential falls in proportion.
//
// Rows that nearly cancel make x large and C x a small difference, so C x is taken in compensated sums: what
// is left is the rounding of x and of G. Where the rows, in the proportions of x, leave no more than that,
// the problem counts as one without a solution.

#include <cfloat>

#include "mtl_kernels/compensated.h"
#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"

namespace mtl {

template <class Team>
class FairNewton {
 public:
  // The factor, nine vectors, and one of int (76 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return PackedCholesky::doubles(num_tasks) + std::size_t{10} * static_cast<std::size_t>(num_tasks);
  }

  // Of the active tasks whose row is not zero.
  MTL_HD FairNewton(const Team& team, const Problem& p, double alpha)
      : team_(team), p_(p), alpha_(alpha), beta_(1.0 / alpha), factor_{opaque(p.scratch), p.num_tasks} {
    double* next = factor_.data + PackedCholesky::doubles(p.num_tasks);
    double** vectors[] = {&inverse_norm_, &alone_, &x_, &s_, &product_, &step_, &next_x_, &next_s_, &column_};
    for (double** vector : vectors) {
      *vector = next;
      next += p.num_tasks;
    }
    tasks_ = reinterpret_cast<int*>(next);
    for (int i = 0; i < p.num_tasks; ++i) {
      const bool inside = p.is_active(i) && p.row(i)[i] > 0.0;
      if (inside && i % team.size() == team.rank()) tasks_[size_] = i;
      size_ += inside;
    }
    team.sync();
  }

  MTL_HD int size() const { return size_; }
  MTL_HD int iterations() const { return iterations_; }

  // Whether there is a solution, which is then that of `scatter`.
  MTL_HD bool solve() {
    if (size_ == 0) return true;
    if (!start()) return false;
    double last = DBL_MAX;
    for (iterations_ = 0; iterations_ < kMaxIterations; ++iterations_) {
      if (cancels()) return false;
      find_step();
      const double change = measure_step();
      if (!(slope_ <= 0.0 && change <= DBL_MAX)) return false;
      if (change <= 4.0 * DBL_EPSILON * size_ || (change < 1e-4 && change > 0.25 * last)) return is_certain();
      last = change;
      if (!move(change)) return false;
    }
    return false;
  }

  // max over the tasks of |s - C x| / (s + |C| x), the relative change of entries of G that would make w
  // exact.
  MTL_HD double residual() const {
    double negated = 0.0;
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      const double error = -fabs(s_[a] - product_[a]) / (s_[a] + terms(a));
      if (error < negated) negated = error;
    }
    return -team_.min(negated);
  }

  // w'Gw.
  MTL_HD double square() const { return dot(x_, product_); }

  // out: w on the tasks of this problem; others keep what they have.
  MTL_HD void scatter(double* out) const {
    const double unit = power(1.0 / scale_, 1.0 - 2.0 / (1.0 + beta_));
    for (int a = team_.rank(); a < size_; a += team_.size()) out[tasks_[a]] = x_[a] * inverse_norm_[a] * unit;
    team_.sync();
  }

 private:
  static constexpr int kMaxIterations = 200;
  static constexpr int kMaxHalvings = 60;
  // Of what cancels, in units of its rounding: how much must be left to count.
  static constexpr double kCertain = 64.0 * DBL_EPSILON;

  MTL_HD static double power(double x, double exponent) {
    return exponent == 0.0 ? 1.0 : exponent == -1.0 ? 1.0 / x : pow(x, exponent);
  }

  MTL_HD double dot(const double* a, const double* b) const {
    double partial = 0.0;
    for (int i = team_.rank(); i < size_; i += team_.size()) partial += a[i] * b[i];
    return team_.sum(partial);
  }

  // The answer to every task alone, times what makes the potential least; norms in units of the largest.
  MTL_HD bool start() {
    double negated = 0.0;
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      const double norm = sqrt(p_.row(tasks_[a])[tasks_[a]]);
      inverse_norm_[a] = 1.0 / norm;
      if (-norm < negated) negated = -norm;
    }
    scale_ = power_of_two_scale(-team_.min(negated));
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      alone_[a] = power(scale_ / inverse_norm_[a], (beta_ - 1.0) / (beta_ + 1.0));
      x_[a] = s_[a] = alone_[a];
    }
    team_.sync();
    multiply(x_, product_);
    if (cancels()) return false;
    const double factor = pow(dot(x_, s_) / dot(x_, product_), 1.0 / (1.0 + beta_));
    const double inverse = power(factor, -beta_);
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      x_[a] *= factor;
      product_[a] *= factor;
      s_[a] *= inverse;
    }
    team_.sync();
    return true;
  }

  MTL_HD double entry(int a, int b) const { return p_.row(tasks_[b])[tasks_[a]]; }

  // out = C x.
  MTL_HD void multiply(const double* x, double* out) {
    for (int b = team_.rank(); b < size_; b += team_.size()) column_[b] = x[b] * inverse_norm_[b];
    team_.sync();
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      CompensatedSum total;
      MTL_NO_UNROLL
      for (int b = 0; b < size_; ++b) total.add_product(entry(a, b), column_[b]);
      out[a] = total.value() * inverse_norm_[a];
    }
    team_.sync();
  }

  // Whether the rows, in the proportions of x, leave no more than their rounding.
  MTL_HD bool cancels() const {
    double partial = 0.0;
    for (int a = team_.rank(); a < size_; a += team_.size()) partial += x_[a];
    const double length = team_.sum(partial);
    return !(square() > kCertain * length * length);
  }

  // step_ = dx, column_ = C dx of the next step.
  MTL_HD void find_step() {
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      column_[a] = root(a) * inverse_norm_[a];
      step_[a] = s_[a] - product_[a];
    }
    team_.sync();
    for (int a = team_.squad(); a < size_; a += team_.num_squads()) {
      double* row = factor_.at(a);
      for (int b = a + team_.lane(); b < size_; b += Team::kLanes)
        row[b] = column_[a] * entry(b, a) * column_[b] + (b == a ? beta_ : 0.0);
    }
    team_.sync();
    factor_.factor(team_, size_, 0.5 * beta_);
    respond();
  }

  MTL_HD double root(int a) const { return sqrt(x_[a] / s_[a]); }

  // step_: from a change of s - C x to the change dx that makes up for it; column_ = C dx.
  MTL_HD void respond() {
    for (int a = team_.rank(); a < size_; a += team_.size()) step_[a] *= root(a);
    team_.sync();
    factor_.forward_substitute(team_, size_, step_);
    factor_.back_substitute(team_, size_, step_);
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      step_[a] *= root(a);
      next_x_[a] = step_[a] * inverse_norm_[a];
    }
    team_.sync();
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      double total = 0.0;
      MTL_NO_UNROLL
      for (int b = 0; b < size_; ++b) total += entry(a, b) * next_x_[b];
      column_[a] = total * inverse_norm_[a];
    }
    team_.sync();
  }

  // (|C| x)_a.
  MTL_HD double terms(int a) const {
    double total = 0.0;
    MTL_NO_UNROLL
    for (int b = 0; b < size_; ++b) total += fabs(entry(a, b)) * inverse_norm_[b] * x_[b];
    return total * inverse_norm_[a];
  }

  // Whether all weights would keep their size if the rows, but for rounding, cancelled more. By the last
  // factor.
  MTL_HD bool is_certain() {
    for (int a = team_.rank(); a < size_; a += team_.size()) step_[a] = kCertain * terms(a);
    team_.sync();
    respond();
    bool lost = false;
    for (int a = team_.rank(); a < size_; a += team_.size()) lost = lost || fabs(step_[a]) > x_[a];
    return !team_.any(lost);
  }

  MTL_HD bool follows(int a) const { return x_[a] < beta_ * s_[a]; }

  // step_: the relative change of x, or of s for a task that follows. Returns the largest; `longest_` is the
  // part of the step that keeps all positive, `slope_` what the potential changes along it.
  MTL_HD double measure_step() {
    double slope = 0.0;
    double negated = 0.0;
    double least = 0.0;
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      slope += step_[a] * (product_[a] - s_[a]);
      const double change = follows(a) ? (column_[a] + product_[a]) / s_[a] - 1.0 : step_[a] / x_[a];
      step_[a] = change;
      if (change < least) least = change;
      if (-fabs(change) < negated) negated = -fabs(change);
    }
    slope_ = team_.sum(slope);
    least = team_.min(least);
    longest_ = least < -0.99 ? -0.99 / least : 1.0;
    return -team_.min(negated);
  }

  // Goes along the step as far as the potential falls.
  MTL_HD bool move(double change) {
    double part = longest_;
    for (int n = 0; n < kMaxHalvings; ++n) {
      for (int a = team_.rank(); a < size_; a += team_.size()) {
        const double factor = 1.0 + part * step_[a];
        if (follows(a)) {
          next_s_[a] = s_[a] * factor;
          next_x_[a] = alone_[a] * power(next_s_[a] / alone_[a], -alpha_);
        } else {
          next_x_[a] = x_[a] * factor;
          next_s_[a] = alone_[a] * power(next_x_[a] / alone_[a], -beta_);
        }
      }
      team_.sync();
      double* next_product = factor_.data;
      multiply(next_x_, next_product);
      if (change < 1e-3 || falls(part, next_product)) {
        swap(x_, next_x_);
        swap(s_, next_s_);
        for (int a = team_.rank(); a < size_; a += team_.size()) product_[a] = next_product[a];
        team_.sync();
        return true;
      }
      part *= 0.5;
    }
    return false;
  }

  MTL_HD bool falls(double part, const double* next_product) const {
    double change = 0.0;
    double size = 0.0;
    for (int a = team_.rank(); a < size_; a += team_.size()) {
      const double before = x_[a] * product_[a];
      const double after = next_x_[a] * next_product[a];
      change += 0.5 * (after - before) - gain(a);
      size += fabs(before) + x_[a] * s_[a];
    }
    change = team_.sum(change);
    size = team_.sum(size);
    return change <= 1e-4 * part * slope_ + 16.0 * DBL_EPSILON * size;
  }

  // By how much a_i x^(1-beta) / (1-beta), or log x, is more at next_x_ than at x_.
  MTL_HD double gain(int a) const {
    const double exponent = 1.0 - beta_;
    const double unit = x_[a] * s_[a];
    if (!(x_[a] > 0.0)) return next_x_[a] * next_s_[a] / exponent;
    const double growth = log(next_x_[a] / x_[a]);
    return exponent == 0.0 ? growth : unit * expm1(exponent * growth) / exponent;
  }

  MTL_HD static void swap(double*& a, double*& b) {
    double* const kept = a;
    a = b;
    b = kept;
  }

  const Team& team_;
  const Problem& p_;
  double alpha_, beta_;
  PackedCholesky factor_;
  double *inverse_norm_, *alone_, *x_, *s_, *product_, *step_, *next_x_, *next_s_, *column_;
  int* tasks_;
  int size_ = 0;
  int iterations_ = 0;
  double scale_ = 1.0;
  double slope_ = 0.0;
  double longest_ = 1.0;
};

}  // namespace mtl
