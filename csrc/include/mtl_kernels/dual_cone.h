#pragma once

// The quadratic program behind the solvers of solvers/dual_cone.h, on unit rows: with C the cosines of the
// rows,
//   min over y >= 0 of v'Cv / 2 - t'v, v = q + y.
// For q >= 0 and t = 0 that is the nearest point to J'q in the dual cone of the rows; (Cv)_j >= t_j, with
// equality where y_j > 0, are its conditions. A ridge on the diagonal is part of C: C_jk = G_jk / (n_j n_k)
// and C_jj = G_jj / n_j^2 + rho_j = 1.
//
// The active-set method of Lawson and Hanson (1974) on Gram entries. It starts from a block: the rows that q
// violates, without those whose y would be negative. Every step is one of Newton's method from where y is,
// with C + mu I for C, where mu is C's own rounding: that is positive definite whatever rounding made of G.
// Where nothing is violated any more, the last steps go by gradients in compensated sums, so that what is
// left is the rounding of y.

#include "mtl_kernels/compensated.h"
#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"
#include "mtl_kernels/support.h"

namespace mtl {

// The lengths of the rows of G + reg trace(G) I, for all who work on the problem.
struct ConeRows {
  double* norm;     // n_j times a power of two; 0 for a row that is zero or not active
  double* inverse;  // 1 / n_j; 0 likewise
  double* rho;      // the ridge in units of n_j^2

  MTL_HD static constexpr std::size_t doubles(int num_tasks) {
    return std::size_t{3} * static_cast<std::size_t>(num_tasks);
  }

  template <class Team>
  MTL_HD ConeRows(const Team& team, const Problem& p, double reg, double* memory)
      : norm(memory), inverse(memory + p.num_tasks), rho(memory + 2 * p.num_tasks) {
    const double root = power_of_two_scale(sqrt(max_active_diagonal(team, p)));
    double partial = 0.0;
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      norm[j] = p.is_active(j) && p.row(j)[j] > 0.0 ? sqrt(p.row(j)[j]) * root : 0.0;
      partial += norm[j] * norm[j];
    }
    const double ridge = reg * team.sum(partial);
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      const bool there = norm[j] > 0.0;
      if (there && ridge > 0.0) norm[j] = sqrt(norm[j] * norm[j] + ridge);
      inverse[j] = there ? root / norm[j] : 0.0;
      rho[j] = there && ridge > 0.0 ? ridge / norm[j] / norm[j] : 0.0;
    }
    team.sync();
  }
};

template <class Team>
class DualCone {
 public:
  // The factor, six vectors, and two of int.
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return PackedCholesky::doubles(num_tasks) + std::size_t{7} * static_cast<std::size_t>(num_tasks);
  }

  // What `rounding` is of these rows. `scratch` is that of a cone, before there is one.
  MTL_HD static double rounding_of(const Team& team, const Problem& p, const ConeRows& unit, int num_active,
                                   double* scratch) {
    const PackedCholesky factor{scratch, p.num_tasks};
    return cosine_rounding(team, p, unit.inverse, 1.0, 4.0 * DBL_EPSILON * num_active, factor,
                           scratch + PackedCholesky::doubles(p.num_tasks));
  }

  MTL_HD DualCone(const Team& team, const Problem& p, const ConeRows& unit, double rounding, double* scratch)
      : team_(team),
        p_(p),
        unit_(unit),
        num_tasks_(p.num_tasks),
        floor_(rounding),
        factor_{opaque(scratch), p.num_tasks},
        vectors_(factor_.data + PackedCholesky::doubles(p.num_tasks)),
        support_(team, p.num_tasks, vectors_ + std::ptrdiff_t{6} * p.num_tasks) {}

  // What the caller fills in, each rank its own tasks, before `solve`.
  MTL_HD double* q() const { return vectors_; }
  MTL_HD double* t() const { return vectors_ + num_tasks_; }
  MTL_HD double* y() const { return vectors_ + 2 * num_tasks_; }

  // Returns the number of rows that entered the support. The row `without`, if any, keeps its y of 0.
  MTL_HD int solve(int without) {
    begin(without);
    start();
    const int cap = 10 * num_tasks_ + 40;
    double best = evaluate();
    int iterations = 0;
    int polished = 0;
    while (iterations < cap && !is_unbounded_) {
      const int entering = find_violation();
      if (entering >= 0) {
        polished = 0;
        iterations += enter_with(entering);
        settle();
      } else {
        if (support_.size() == 0 || polished == kMostPolishes || !polish()) break;
        ++polished;
      }
      const double value = evaluate();
      // A row may enter once only until the value falls by more than its rounding, which could make a cycle.
      if (value < best - rounding() * length_ * length_) {
        best = value;
        support_.forget_entries();
      }
    }
    return iterations;
  }

  // Whether no v meets the conditions: y() >= 0 of sum 1 then combines rows with t > 0 to nothing but
  // rounding.
  MTL_HD bool is_unbounded() const { return is_unbounded_; }

  // The largest violation of the conditions, for unit rows, relative to the sum of v: what rounding is
  // relative to. Unbounded, the square of the combination.
  MTL_HD double residual() const {
    if (is_unbounded_) return cancelled_ > 0.0 ? cancelled_ : 0.0;
    double negated = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if ((support_.state(j) & Rows::kExcluded) != 0) continue;
      const double r = gradient()[j];
      const double violation = (support_.state(j) & Rows::kInside) != 0 ? -fabs(r) : r;
      negated = violation < negated ? violation : negated;
    }
    negated = team_.min(negated);
    return negated < 0.0 ? -negated / length_ : 0.0;
  }

  // ||v||^2 = q'Cv + t'y, as r'y = 0. A plain sum would end in the rounding of a long y.
  MTL_HD double square() const {
    for (int j = team_.rank(); j < num_tasks_; j += team_.size())
      column()[j] = (q()[j] + y()[j]) * unit_.inverse[j];
    team_.sync();
    double partial = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (q()[j] != 0.0) partial += q()[j] * (product_at(j) + unit_.rho[j] * (q()[j] + y()[j]));
      partial += t()[j] * y()[j];
    }
    return team_.sum(partial);
  }

  // What v'Cv may be and still be 0.
  MTL_HD double rounding_of_square() const { return floor_ * length_ * length_; }

 private:
  using Rows = Support<Team>;
  static constexpr int kMostPolishes = 4;

  MTL_HD double* gradient() const { return vectors_ + 3 * num_tasks_; }  // Cv - t
  MTL_HD double* start_gradient() const { return vectors_ + 4 * num_tasks_; }
  MTL_HD double* column() const { return vectors_ + 5 * num_tasks_; }

  MTL_HD double rounding() const { return 0.5 * floor_; }

  // y = 0, and the gradient there.
  MTL_HD void begin(int without) {
    support_.clear();
    is_unbounded_ = false;
    double partial = 0.0;
    double negated = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      y()[j] = 0.0;
      support_.set_state(j, unit_.inverse[j] > 0.0 && j != without ? 0 : Rows::kExcluded);
      column()[j] = q()[j] * unit_.inverse[j];
      partial += q()[j];
      negated = -t()[j] < negated ? -t()[j] : negated;
    }
    const double most = -team_.min(negated);
    has_targets_ = most > 0.0;
    fixed_length_ = team_.sum(partial) + most;
    length_ = fixed_length_;
    team_.sync();
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      double total = 0.0;
      for (int k = 0; k < num_tasks_; ++k) {
        if (column()[k] != 0.0) total += p_.row(k)[j] * column()[k];
      }
      gradient()[j] = start_gradient()[j] = total * unit_.inverse[j] + unit_.rho[j] * q()[j] - t()[j];
    }
    team_.sync();
  }

  // The minimizer over the rows that are violated at y = 0, without those that hardly differ from others of
  // them, and as long as some y is negative without these.
  MTL_HD void start() {
    for (int j = 0; j < num_tasks_; ++j) {
      if (support_.state(j) != 0 || !(gradient()[j] < -rounding() * length_)) continue;
      enter(j);
      if (hardly_differs()) drop(support_.size() - 1);
    }
    team_.sync();
    for (bool again = support_.size() > 0; again;) {
      find_step();
      for (int k = team_.rank(); k < support_.size(); k += team_.size())
        y()[support_[k]] = column()[k] > 0.0 ? column()[k] : 0.0;
      team_.sync();
      again = false;
      for (int k = support_.size() - 1; k >= 0; --k) {
        const bool leaves = y()[support_[k]] == 0.0;
        team_.sync();
        if (leaves) drop(k);
        again = (again || leaves) && support_.size() > 0;
      }
    }
    support_.forget_entries();
  }

  // Puts a row at the end of the support.
  MTL_HD void enter(int task) {
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const int other = support_[k];
      column()[k] = p_.row(other)[task] * unit_.inverse[other] * unit_.inverse[task];
    }
    support_.enter(task);
    factor_.append(team_, support_.size() - 1, column(), 1.0 + floor_, floor_);
  }

  // Puts a row there, and those that are violated half as much. Returns how many. With targets it comes
  // alone, for `settle` to see whether it cancels others.
  MTL_HD int enter_with(int task) {
    if (has_targets_) {
      enter(task);
      return 1;
    }
    const int before = support_.size();
    const double half = 0.5 * gradient()[task];
    for (int j = 0; j < num_tasks_; ++j) {
      if (support_.state(j) == 0 && gradient()[j] <= half) enter(j);
    }
    return support_.size() - before;
  }

  // Takes the row at a place in the support out of it.
  MTL_HD void drop(int place) {
    factor_.remove(team_, support_.size(), place, column());
    support_.remove(place);
  }

  // Whether the last row of the support is all but dependent on the others: within 1e-4 of their span.
  MTL_HD bool hardly_differs() const { return factor_.at(support_.size() - 1)[support_.size() - 1] < 1e-4; }

  // column = what takes y to the minimizer over the support.
  MTL_HD void find_step() {
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) column()[k] = -gradient()[support_[k]];
    team_.sync();
    factor_.forward_substitute(team_, support_.size(), column());
    factor_.back_substitute(team_, support_.size(), column());
  }

  // Moves to the minimizer over the support; rows whose y would turn negative on the way leave. The gradient
  // is then out of date. Where there is no minimizer, stops with what shows it in y.
  MTL_HD void settle() {
    while (support_.size() > 0) {
      find_step();
      const IndexedValue leaving = first_to_leave();
      if (leaving.index < 0 && has_targets_ && hardly_turns()) {
        if (cancels()) return;
        find_step();
      }
      for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
        const double step = leaving.index < 0 ? column()[k] : leaving.value * column()[k];
        const double moved = y()[support_[k]] + step;
        y()[support_[k]] = moved > 0.0 && k != leaving.index ? moved : 0.0;
      }
      team_.sync();
      if (leaving.index < 0) return;
      drop(leaving.index);
      evaluate_support<false>();
    }
  }

  // Whether the square of the combination that the step is, for unit rows and a sum of 1, may be rounding:
  // with that of mu it is -step'r.
  MTL_HD bool hardly_turns() const {
    double product = 0.0;
    double length = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      product -= column()[k] * gradient()[support_[k]];
      length += column()[k];
    }
    product = team_.sum(product);
    length = team_.sum(length);
    return length > 0.0 && product <= 4.0 * floor_ * length * length;
  }

  // Whether the step, which every y survives, is one that could go on for ever: a combination of rows that
  // are all to be met by more than 0, but cancel to rounding. y is then that combination, with sum 1.
  MTL_HD bool cancels() {
    double partial = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      partial += column()[k] > 0.0 ? column()[k] : 0.0;
    const double length = team_.sum(partial);
    if (!(length > 0.0)) return false;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      column()[k] = column()[k] > 0.0 ? column()[k] / length * unit_.inverse[support_[k]] : 0.0;
    team_.sync();
    partial = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      CompensatedSum total;
      MTL_NO_UNROLL
      for (int l = 0; l < support_.size(); ++l)
        total.add_product(p_.row(support_[k])[support_[l]], column()[l]);
      partial += column()[k] * total.value();
    }
    cancelled_ = team_.sum(partial);
    if (!(cancelled_ <= 2.0 * floor_)) return false;
    is_unbounded_ = true;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) y()[j] = 0.0;
    team_.sync();
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      y()[support_[k]] = column()[k] / unit_.inverse[support_[k]];
    team_.sync();
    return true;
  }

  // A last step from a gradient in compensated sums. Returns whether it was worth one.
  MTL_HD bool polish() {
    evaluate_support<true>();
    double negated = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const double r = -fabs(gradient()[support_[k]]);
      negated = r < negated ? r : negated;
    }
    if (-team_.min(negated) <= DBL_EPSILON * length_) return false;
    settle();
    return true;
  }

  // Place in the support of the first y to reach 0, and the step at which it does; index -1 when none does.
  MTL_HD IndexedValue first_to_leave() const {
    IndexedValue first = {0.0, -1};
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const double own = y()[support_[k]];
      if (own + column()[k] > 0.0) continue;
      first = lesser(first, {own > 0.0 ? own / -column()[k] : 0.0, k});
    }
    return team_.argmin(first.value, first.index);
  }

  // The gradient, in plain sums. Returns the value, but for what does not depend on y.
  MTL_HD double evaluate() {
    fill_column();
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) gradient()[j] = plain_gradient(j);
    team_.sync();
    double value = 0.0;
    double length = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const int task = support_[k];
      value += y()[task] * (gradient()[task] + start_gradient()[task]);
      length += y()[task];
    }
    length_ = fixed_length_ + team_.sum(length);
    return 0.5 * team_.sum(value);
  }

  // The gradient on the support alone.
  template <bool kCompensated>
  MTL_HD void evaluate_support() {
    if constexpr (kCompensated) {
      for (int j = team_.rank(); j < num_tasks_; j += team_.size())
        column()[j] = (q()[j] + y()[j]) * unit_.inverse[j];
      team_.sync();
    } else {
      fill_column();
    }
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const int j = support_[k];
      gradient()[j] =
          kCompensated ? (product_at(j) - t()[j]) + unit_.rho[j] * (q()[j] + y()[j]) : plain_gradient(j);
    }
    team_.sync();
  }

  // inverse_j sum_l G_jl column_l over all tasks, compensated.
  MTL_HD double product_at(int j) const {
    CompensatedSum total;
    MTL_NO_UNROLL
    for (int l = 0; l < num_tasks_; ++l) {
      if (column()[l] != 0.0) total.add_product(p_.row(j)[l], column()[l]);
    }
    return total.value() * unit_.inverse[j];
  }

  MTL_HD void fill_column() {
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      column()[k] = y()[support_[k]] * unit_.inverse[support_[k]];
    team_.sync();
  }

  MTL_HD double plain_gradient(int j) const {
    double total = 0.0;
    for (int k = 0; k < support_.size(); ++k) total += p_.row(support_[k])[j] * column()[k];
    return total * unit_.inverse[j] + unit_.rho[j] * y()[j] + start_gradient()[j];
  }

  // The row that is violated most; -1 when none is by more than rounding.
  MTL_HD int find_violation() const {
    IndexedValue worst = {0.0, -1};
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (support_.state(j) == 0 && gradient()[j] < -rounding() * length_)
        worst = lesser(worst, {gradient()[j], j});
    }
    return team_.argmin(worst.value, worst.index).index;
  }

  const Team& team_;
  const Problem& p_;
  const ConeRows& unit_;
  int num_tasks_;
  double floor_;  // and mu
  PackedCholesky factor_;
  double* vectors_;
  Rows support_;
  bool has_targets_ = false;
  bool is_unbounded_ = false;
  double cancelled_ = 0.0;
  double fixed_length_ = 0.0;  // of q and t
  double length_ = 0.0;        // with y: what rounding is relative to
};

}  // namespace mtl
