#pragma once

// CAGrad (Liu et al. 2021, arXiv 2110.14048, Algorithm 1): with g0 = J'u the mean of the active rows and
// p = c ||g0||, w_in minimises F(w) = w'Gu + p sqrt(w'Gw) over the simplex, and w = u + p w_in / ||J'w_in||.
// Then d = J'w is as far in the direction of its least g_i'd as ||d - g0|| <= p allows.
//   options: {c >= 0, rescale: w / (1: 1 + c^2, 2: 1 + c), times the number of active tasks (0/1)}
//   certificate: {F(w_in) - min_j g_j'd over active j, d before it is rescaled, iterations}; F(w_in) -
//   optimum <= gap
// Where J'w_in = 0 no d within p of g0 descends every loss, and w = 0. So it is for a mean of 0.
//
// On unit rows: with C_ij = G_ij / (n_i n_j), a_i = min n / n_i, b_i = g0'g_i / n_i and v_i = w_i n_i, F is
// (b'v + p sqrt(v'Cv)) / a'v, the same for all multiples of v >= 0. An active-set method like Wolfe's for the
// least norm (wolfe.h): a row enters where F falls fastest, then v moves to the minimiser over the rows of
// the support, and those leave whose v would turn negative. That minimiser has a closed form. Of all v with
// a'v = 1, C^-1 a / a'C^-1 a is shortest, and b'v falls fastest along C^-1 (h a - b), h = a'C^-1 b / a'C^-1
// a, orthogonal to it; so the minimiser is a multiple of C^-1 ((h + sqrt((p^2 - r^2) / a'C^-1 a)) a - b) with
// r the length of C^-1 (h a - b). With r >= p there is none, and F falls all along that direction.
//
// C + ridge I stands for C there, with a ridge of the size of C's rounding: it has an inverse whatever C is,
// and F a gradient where J'v = 0. Newton's method takes the ridge out again at the end, with C v in
// compensated sums: rows that nearly cancel have v of 1e6 and more, and the support that is best without the
// ridge. That F is least where J'v = 0 is found beforehand: where v'Cv <= 2 ridge (sum v)^2 of some v, it
// counts as 0.

#include "mtl_kernels/compensated.h"
#include "mtl_kernels/dual_cone.h"
#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"
#include "mtl_kernels/support.h"

namespace mtl {

template <class Team>
class ConflictAverse {
 public:
  // The factor, nine vectors, and two of int (78 KB at K = 128); or, before that, what the dual cone needs.
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    const std::size_t own =
        PackedCholesky::doubles(num_tasks) + std::size_t{10} * static_cast<std::size_t>(num_tasks);
    const std::size_t cone = ConeRows::doubles(num_tasks) + DualCone<SerialTeam>::scratch_doubles(num_tasks);
    return own > cone ? own : cone;
  }

  MTL_HD ConflictAverse(const Team& team, const Problem& p, int num_active)
      : team_(team),
        p_(p),
        num_tasks_(p.num_tasks),
        num_active_(num_active),
        scale_(power_of_two_scale(max_active_diagonal(team, p))),
        ridge_(4.0 * DBL_EPSILON * num_active),
        factor_{opaque(p.scratch), p.num_tasks},
        support_(team, p.num_tasks,
                 factor_.data + PackedCholesky::doubles(p.num_tasks) + std::ptrdiff_t{9} * p.num_tasks) {
    double* next = factor_.data + PackedCholesky::doubles(num_tasks_);
    double** vectors[] = {&inverse_norm_, &a_,      &b_,         &v_,        &target_,
                          &product_,      &column_, &forward_a_, &forward_b_};
    for (double** vector : vectors) {
      *vector = next;
      next += num_tasks_;
    }
    best_ = p.weights;
  }

  // p.weights and p.certificate, but for the rescaling.
  MTL_HD void run(double c) {
    double gap = 0.0;
    int iterations = 0;
    set_weights(1.0 / num_active_);
    if (c * c > 0.0) {  // else w is the mean but for rounding
      bool is_zero = false, asked = false;
      for (;;) {
        is_zero = is_zero || !find_mean(c);
        if (is_zero || asked || clearly_descends()) break;
        asked = true;  // which leaves nothing of what find_mean has found
        is_zero = is_stationary(c, &gap, &iterations);
        set_weights(1.0 / num_active_);
      }
      if (is_zero) {
        set_weights(0.0);
      } else {
        iterations = descend(10 * num_tasks_ + 40);
        gap = refine(4 * num_tasks_ + 40);
        for (int i = team_.rank(); i < num_tasks_; i += team_.size())
          best_[i] = (p_.is_active(i) ? 1.0 / num_active_ : 0.0) + unit_ * radius_ * v_[i] * inverse_norm_[i];
      }
    }
    set_certificate(team_, p_, gap > 0.0 ? gap / scale_ : 0.0, iterations);
    team_.sync();
  }

 private:
  MTL_HD void set_weights(double value) {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size())
      p_.weights[i] = p_.is_active(i) ? value : 0.0;
    team_.sync();
  }

  // Norms, a, and b and p in units of ||g0|| max(1, c); the support starts as the vertex where F is least.
  // Returns whether g0 is more than rounding. Zero rows take no part: their inverse norm is 0.
  MTL_HD bool find_mean(double c) {
    gram_times(team_, p_, p_.weights, scale_, product_);
    double squares = 0.0, length = 0.0, inverse_least = 0.0;
    bool zero = false;
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      const double square = p_.is_active(i) ? scale_ * p_.row(i)[i] : 0.0;
      const double norm = square > 0.0 ? sqrt(square) : 0.0;
      inverse_norm_[i] = square > 0.0 ? 1.0 / norm : 0.0;
      squares += product_[i];
      length += norm;
      if (inverse_norm_[i] > inverse_least) inverse_least = inverse_norm_[i];
      zero = zero || (p_.is_active(i) && !(square > 0.0));
      v_[i] = 0.0;
      support_.set_state(i, 0);
    }
    squares = team_.sum(squares) / num_active_;
    support_.clear();
    length = team_.sum(length) / num_active_;
    has_zero_row_ = team_.any(zero);
    inverse_least_ = -team_.min(-inverse_least);
    ridge_ = cosine_rounding(team_, p_, inverse_norm_, scale_, ridge_, factor_, column_);
    mean_square_ = squares;
    if (!(squares > 2.0 * ridge_ * length * length)) return false;
    unit_ = sqrt(squares) * (c > 1.0 ? c : 1.0);
    radius_ = c > 1.0 ? 1.0 : c;
    IndexedValue least = {0.0, -1};
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      if (inverse_norm_[i] == 0.0) continue;
      // The square of a number below 1e-150 would be 0.
      const double a = inverse_norm_[i] / inverse_least_;
      a_[i] = a > 1e-150 ? a : 1e-150;
      b_[i] = product_[i] * inverse_norm_[i] / unit_;
      least = lesser(least, {(b_[i] + radius_) / a_[i], i});
    }
    least = team_.argmin(least.value, least.index);
    if (team_.rank() == 0) v_[least.index] = 1.0;
    enter(least.index, Support<Team>::kInside);
    return true;
  }

  // Until F falls nowhere, or no more than rounding tells. `best_` is the best v, and in the end v and the
  // support are of it. Returns the number of rows that entered.
  MTL_HD int descend(int cap) {
    evaluate();
    double best_value = value_;
    save();
    int iterations = 0;
    while (iterations < cap) {
      const int entering = find_violation();
      if (entering < 0) break;
      ++iterations;
      improve_with(entering);
      evaluate();
      // What changes nothing is kept, but a row may enter once only until F falls by more than its rounding,
      // so that rounding cannot make a cycle.
      if (value_ <= best_value + noise_) {
        if (value_ < best_value - noise_) support_.forget_entries();
        best_value = value_ < best_value ? value_ : best_value;
        save();
      } else {
        restore();
        evaluate();
      }
    }
    return iterations;
  }

  // Whether g0 descends every loss, and by enough for the rows not to be stationary, up to rounding.
  MTL_HD bool clearly_descends() const {
    double least = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      const double cosine = b_[j] * unit_ / sqrt(mean_square_);
      if (p_.is_active(j) && !(inverse_norm_[j] > 0.0 && cosine > 4.0 * sqrt(2.0 * ridge_))) least = -1.0;
    }
    return team_.min(least) == 0.0;
  }

  // Whether some rows add up to 0, up to rounding, and a d with g_j'd >= 0 for all j is within p of g0. Then
  // the least F is 0, and `gap` what is missing from the nearest such d. Both are questions to the dual cone,
  // whose scratch takes the place of everything else.
  MTL_HD bool is_stationary(double c, double* gap, int* iterations) {
    const ConeRows unit(team_, p_, 0.0, p_.scratch);
    DualCone<Team> cone(team_, p_, unit, ridge_, p_.scratch + ConeRows::doubles(num_tasks_));
    double length = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) length += unit.norm[j];
    length = team_.sum(length);
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      cone.q()[j] = unit.norm[j] / length;
      cone.t()[j] = 0.0;
    }
    team_.sync();
    *iterations = cone.solve(-1);
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (unit.norm[j] > 0.0) best_[j] += cone.y()[j] * (length / num_active_) / unit.norm[j];
    }
    team_.sync();
    double* product = cone.t();  // of d with each row
    gram_times(team_, p_, best_, scale_, product);
    double square = 0.0, least = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      square += best_[j] * product[j];
      if (product[j] < least) least = product[j];
    }
    square = team_.sum(square);
    *gap = -team_.min(least);
    // d is the projection of g0 onto the cone: ||d - g0||^2 = ||g0||^2 - ||d||^2.
    if (c < 1.0 && mean_square_ - square > c * c * mean_square_) return false;
    if (has_zero_row_) return true;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      cone.q()[j] = 0.0;
      cone.t()[j] = p_.is_active(j) ? 1.0 : 0.0;
    }
    team_.sync();
    cone.solve(-1);
    return cone.is_unbounded();
  }

  // Newton's method without the ridge but in its factor, for as many steps as it takes: rows leave the
  // support where they would turn negative, and enter it once those in it are right. `best_` is the v of the
  // least gap, which is returned, and in the end v is it.
  MTL_HD double refine(int cap) {
    refined_ = true;
    evaluate();
    double least = gap(), previous = least;
    save();
    support_.forget_entries();
    MTL_NO_UNROLL
    for (int step = 0; step < cap && least > DBL_EPSILON * unit_; ++step) {
      const IndexedValue leaving = move();
      if (leaving.index >= 0 && support_.size() > 1) {
        support_.remove(leaving.index);
        factor_from(leaving.index);
      }
      evaluate();
      const double found = gap();
      if (!(fabs(value_) <= DBL_MAX && found <= DBL_MAX)) break;
      const bool falls = found < 0.5 * previous;
      previous = found;
      if (found < least) {
        if (found < 0.5 * least) support_.forget_entries();
        least = found;
        save();
      }
      if (leaving.index >= 0 || falls) continue;
      const int entering = find_violation();
      if (entering < 0) break;
      enter(entering);
      previous = DBL_MAX;
    }
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) v_[i] = best_[i];
    team_.sync();
    return least;
  }

  // A step of Newton's method, up to where the first v turns negative, whose place is returned.
  MTL_HD IndexedValue move() {
    solve_residual();
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) target_[k] += v_[support_[k]];
    team_.sync();
    const IndexedValue leaving = first_to_leave(true);
    advance(leaving, true, leaving.index < 0);
    return leaving;
  }

  // target_ = C^-1 (value_ a - b - p product_) / p on the support.
  MTL_HD void solve_residual() {
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const int i = support_[k];
      target_[k] = (a_[i] * value_ - b_[i]) / radius_ - product_[i];
    }
    team_.sync();
    factor_.forward_substitute(team_, support_.size(), target_);
    factor_.back_substitute(team_, support_.size(), target_);
  }

  // F(v) - min_j g_j'(g0 + p J'v), in units of scale_ * G.
  MTL_HD double gap() const {
    double negated = 0.0;
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (inverse_norm_[j] == 0.0) continue;
      const double below = (b_[j] + radius_ * product_[j]) / inverse_norm_[j] - value_ / inverse_least_;
      if (below < negated) negated = below;
    }
    return -team_.min(negated) * unit_;
  }

  MTL_HD double entry(int i, int j) const {
    return scale_ * p_.row(i)[j] * inverse_norm_[i] * inverse_norm_[j];
  }

  // Factors the row at place n of the support.
  MTL_HD void append(int n) {
    const int task = support_[n];
    for (int k = team_.rank(); k < n; k += team_.size()) column_[k] = entry(support_[k], task);
    team_.sync();
    factor_.append(team_, n, column_, 1.0 + ridge_, ridge_);
    double total_a = 0.0, total_b = 0.0;
    for (int k = team_.rank(); k < n; k += team_.size()) {
      total_a += column_[k] * forward_a_[k];
      total_b += column_[k] * forward_b_[k];
    }
    total_a = team_.sum(total_a);
    total_b = team_.sum(total_b);
    if (team_.rank() == 0) {
      forward_a_[n] = (a_[task] - total_a) / factor_.at(n)[n];
      forward_b_[n] = (b_[task] - total_b) / factor_.at(n)[n];
    }
    team_.sync();
  }

  MTL_HD void factor_from(int position) {
    for (int n = position; n < support_.size(); ++n) append(n);
  }

  MTL_HD double product_at(int j) const {
    if (refined_) {
      CompensatedSum total;
      MTL_NO_UNROLL
      for (int k = 0; k < support_.size(); ++k) total.add_product(p_.row(support_[k])[j], column_[k]);
      return scale_ * total.value();
    }
    double total = 0.0;
    for (int k = 0; k < support_.size(); ++k) total += scale_ * p_.row(support_[k])[j] * column_[k];
    return total;
  }

  // F(v), and what rounding makes of it; v is scaled to v'(C + ridge I)v = 1, and product_ = (C + ridge I) v,
  // refined without the ridge.
  MTL_HD void evaluate() {
    const double ridge = refined_ ? 0.0 : ridge_;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      column_[k] = v_[support_[k]] * inverse_norm_[support_[k]];
    team_.sync();
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      product_[j] = inverse_norm_[j] > 0.0 ? product_at(j) * inverse_norm_[j] + ridge * v_[j] : 0.0;
    }
    team_.sync();
    double squares = 0.0, own = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const double v = v_[support_[k]];
      squares += v * product_[support_[k]];
      own += v * v;
    }
    squares = team_.sum(squares);
    own = ridge_ * team_.sum(own);
    const double inverse = 1.0 / sqrt(squares > own ? squares : own);
    double share = 0.0, slope = 0.0, slopes = 0.0, length = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const int i = support_[k];
      const double v = v_[i] * inverse;
      share += a_[i] * v;
      slope += b_[i] * v;
      slopes += fabs(b_[i]) * v;
      length += v;
    }
    share = team_.sum(share);
    slope = team_.sum(slope);
    slopes = team_.sum(slopes);
    length_ = team_.sum(length);
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      v_[i] *= inverse;
      product_[i] *= inverse;
    }
    team_.sync();
    value_ = (slope + radius_) / share;
    const double squared = refined_ ? DBL_EPSILON * length_ * length_ : length_ * length_;
    noise_ = rounding() * (slopes + radius_ * (1.0 + 0.5 * squared)) / share;
  }

  MTL_HD double rounding() const { return 2.0 * DBL_EPSILON; }

  // The task whose g_j'd lies furthest below F, if by more than rounding; -1 when there is none.
  MTL_HD int find_violation() const {
    IndexedValue worst = {0.0, -1};
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (inverse_norm_[j] == 0.0 || support_.state(j) != 0) continue;
      const double residual = b_[j] + radius_ * product_[j] - a_[j] * value_;
      if (residual >= -rounding() * (fabs(b_[j]) + radius_ * length_) - a_[j] * noise_) continue;
      worst = lesser(worst, {residual / a_[j], j});
    }
    return team_.argmin(worst.value, worst.index).index;
  }

  // Adds a row, then moves to where F is least over the support, dropping the rows whose v would turn
  // negative on the way.
  MTL_HD void improve_with(int entering) {
    enter(entering);
    while (support_.size() > 1) {
      const bool bounded = find_minimizer();
      IndexedValue leaving = first_to_leave(bounded);
      const bool reached = leaving.index < 0;
      // Of a direction a'v stays the same, so some v turns negative. If none seems to, that of the shortest
      // row is lost in rounding, and v comes to it only at the end of the direction.
      if (reached && !bounded) leaving = shortest_of_support();
      advance(leaving, bounded, reached);
      if (leaving.index < 0) return;
      support_.remove(leaving.index);
      factor_from(leaving.index);
    }
    if (team_.rank() == 0) v_[support_[0]] = 1.0;
    team_.sync();
  }

  MTL_HD void enter(int task, int state = Support<Team>::kInside | Support<Team>::kEntered) {
    support_.enter(task, state);
    append(support_.size() - 1);
  }

  // Moves v to target_, or as far as it takes for a row to leave.
  MTL_HD void advance(const IndexedValue& leaving, bool bounded, bool reached) {
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const double v = v_[support_[k]];
      double moved = target_[k];
      if (!reached) moved = v + leaving.value * (bounded ? target_[k] - v : target_[k]);
      v_[support_[k]] = moved > 0.0 && k != leaving.index ? moved : 0.0;
    }
    team_.sync();
  }

  MTL_HD IndexedValue shortest_of_support() const {
    IndexedValue shortest = {0.0, -1};
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      shortest = lesser(shortest, {-a_[support_[k]], k});
    return team_.argmin(shortest.value, shortest.index);
  }

  // Position in the support of the first v to reach 0 on the way to target_, or, where F is not bounded,
  // along it; and the step at which it does. Index -1 when none does.
  MTL_HD IndexedValue first_to_leave(bool bounded) const {
    IndexedValue first = {0.0, -1};
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      if (bounded ? target_[k] > 0.0 : target_[k] >= 0.0) continue;
      const double v = v_[support_[k]];
      const double step = v > 0.0 ? v / (bounded ? v - target_[k] : -target_[k]) : 0.0;
      first = lesser(first, {step, k});
    }
    return team_.argmin(first.value, first.index);
  }

  // target_: where F is least over the support, as long as v on the sphere; or, returning false, the
  // direction in which it falls without end.
  MTL_HD bool find_minimizer() {
    double aa = 0.0, ab = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      aa += forward_a_[k] * forward_a_[k];
      ab += forward_a_[k] * forward_b_[k];
    }
    aa = team_.sum(aa);
    const double h = team_.sum(ab) / aa;
    double squares = 0.0;
    for (int k = team_.rank(); k < support_.size(); k += team_.size()) {
      const double steepest = h * forward_a_[k] - forward_b_[k];
      squares += steepest * steepest;
    }
    squares = team_.sum(squares);
    const double left = radius_ * radius_ - squares;
    const bool bounded = left > 0.0;
    const double factor = bounded ? h + sqrt(left / aa) : h;
    for (int k = team_.rank(); k < support_.size(); k += team_.size())
      target_[k] = (factor * forward_a_[k] - forward_b_[k]) / (bounded ? radius_ : 1.0);
    team_.sync();
    factor_.back_substitute(team_, support_.size(), target_);
    return bounded;
  }

  MTL_HD void save() {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) best_[i] = v_[i];
    team_.sync();
  }

  MTL_HD void restore() {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) v_[i] = best_[i];
    support_.restore(best_);
    factor_from(0);
  }

  const Team& team_;
  const Problem& p_;
  int num_tasks_, num_active_;
  double scale_, ridge_;
  PackedCholesky factor_;
  Support<Team> support_;
  double *inverse_norm_, *a_, *b_, *v_, *target_, *product_, *column_, *forward_a_, *forward_b_;
  double* best_;
  bool refined_ = false;
  bool has_zero_row_ = false;
  double mean_square_ = 0.0;          // ||g0||^2, as the lengths below in units of scale_ * G
  double inverse_least_ = 1.0;        // 1 / min n
  double unit_ = 1.0, radius_ = 1.0;  // ||g0|| max(1, c), and p in this unit
  double value_ = 0.0, noise_ = 0.0;  // F in units of unit_ / inverse_least_, and its rounding
  double length_ = 0.0;               // the sum of v
};

struct Cagrad {
  static constexpr const char* name = "cagrad";
  static constexpr int num_options = 3;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return false; }

  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return ConflictAverse<SerialTeam>::scratch_doubles(num_tasks);
  }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const double c = p.options[0];
    ConflictAverse<Team>(team, p, num_active).run(c);
    const double divisor = p.options[1] == 0.0 ? 1.0 : p.options[1] == 1.0 ? 1.0 + c * c : 1.0 + c;
    const double factor = p.options[2] != 0.0 ? num_active : 1.0;
    for (int i = team.rank(); i < p.num_tasks; i += team.size()) p.weights[i] *= factor / divisor;
    team.sync();
  }
};

}  // namespace mtl
