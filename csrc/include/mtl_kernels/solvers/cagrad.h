#pragma once

// CAGrad (Liu et al. 2021, arXiv 2110.14048, Algorithm 1): with g0 = J'u the mean of the active rows and
// p = c ||g0||, w_in minimises F(w) = w'Gu + p sqrt(w'Gw) over the simplex, and w = u + p w_in / ||J'w_in||.
// Then d = J'w is as far in the direction of its least g_i'd as ||d - g0|| <= p allows.
//   options: {c >= 0, rescale (0 none, 1: w / (1 + c^2), 2: w / (1 + c)), times the number of active tasks
//   (0/1)} certificate: {F(w_in) - min_j g_j'(g0 + p J'w_in / ||J'w_in||) over active j, iterations}, of w
//   before it
//     is rescaled; F(w_in) - optimum <= gap
// A minimiser with J'w_in = 0 is a Pareto-stationary point: w = 0. So is a mean of 0.
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
// and F a gradient where J'v = 0. Newton's method takes the ridge out again at the end. Where all is
// rounding, of v'Cv <= 2 ridge (sum v)^2, J'v counts as 0.

#include "mtl_kernels/small_matrix.h"
#include "mtl_kernels/solver.h"

namespace mtl {

template <class Team>
class ConflictAverse {
 public:
  // The factor, nine vectors, and two of int (78 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return PackedCholesky::doubles(num_tasks) + std::size_t{10} * static_cast<std::size_t>(num_tasks);
  }

  MTL_HD ConflictAverse(const Team& team, const Problem& p, int num_active)
      : team_(team),
        p_(p),
        num_tasks_(p.num_tasks),
        num_active_(num_active),
        scale_(power_of_two_scale(max_active_diagonal(team, p))),
        ridge_(4.0 * DBL_EPSILON * num_active),
        factor_{opaque(p.scratch), p.num_tasks} {
    double* next = factor_.data + PackedCholesky::doubles(num_tasks_);
    double** vectors[] = {&inverse_norm_, &a_,      &b_,         &v_,        &target_,
                          &product_,      &column_, &forward_a_, &forward_b_};
    for (double** vector : vectors) {
      *vector = next;
      next += num_tasks_;
    }
    support_ = reinterpret_cast<int*>(next);
    state_ = support_ + num_tasks_;
    best_ = p.weights;
  }

  // p.weights and p.certificate, but for the rescaling.
  MTL_HD void run(double c) {
    set_equal(1.0 / num_active_);
    if (c * c == 0.0) {  // also of a c so small that w is the mean but for rounding
      set_certificate(team_, p_, 0.0, 0);
      team_.sync();
      return;
    }
    if (!find_mean(c)) {
      set_equal(0.0);
      set_certificate(team_, p_, 0.0, 0);
      team_.sync();
      return;
    }
    const int iterations = descend(10 * num_tasks_ + 40);
    const bool cancels = support_cancels();
    const bool stationary = cancels || (has_zero_row_ && value_ >= 0.0);
    const double gap = stationary ? gap_at_zero(cancels, 10 * num_tasks_ + 40) : refine();
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      const double share = p_.is_active(i) ? 1.0 / num_active_ : 0.0;
      best_[i] = stationary ? 0.0 : share + unit_ * radius_ * v_[i] * inverse_norm_[i];
    }
    set_certificate(team_, p_, gap > 0.0 ? gap / scale_ : 0.0, iterations);
    team_.sync();
  }

 private:
  enum State : int { kInSupport = 1, kEntered = 2 };  // bits; kEntered: since F last fell

  MTL_HD void set_equal(double value) {
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
      state_[i] = 0;
    }
    squares = team_.sum(squares) / num_active_;
    length = team_.sum(length) / num_active_;
    has_zero_row_ = team_.any(zero);
    inverse_least_ = -team_.min(-inverse_least);
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
    if (team_.rank() == 0) {
      support_[0] = least.index;
      state_[least.index] = kInSupport;
      v_[least.index] = 1.0;
    }
    team_.sync();
    append(least.index);
    return true;
  }

  // Until F falls nowhere, or no more than rounding tells. `best_` is the best v, and in the end v and the
  // support are of it. Returns the number of rows that entered.
  MTL_HD int descend(int cap) {
    evaluate(ridge_);
    double best_value = value_;
    save();
    int iterations = 0;
    while (iterations < cap) {
      const int entering = find_violation();
      if (entering < 0) break;
      ++iterations;
      improve_with(entering);
      evaluate(ridge_);
      // What changes nothing is kept, but a row may enter once only until F falls by more than its rounding,
      // so that rounding cannot make a cycle.
      if (value_ <= best_value + noise_) {
        if (value_ < best_value - noise_) forget_entries();
        best_value = value_ < best_value ? value_ : best_value;
        save();
      } else {
        restore();
        evaluate(ridge_);
      }
    }
    return iterations;
  }

  // Whether the rows of the support add up to 0. F, which is least there, is then 0.
  MTL_HD bool support_cancels() const {
    double inverse_square = 0.0, share = 0.0;
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      inverse_square += forward_a_[k] * forward_a_[k];
      share += a_[support_[k]] * v_[support_[k]];
    }
    inverse_square = team_.sum(inverse_square);  // of the least norm among a'v = 1
    share = team_.sum(share);
    return share * share <= 2.0 * ridge_ * length_ * length_ * inverse_square;
  }

  // The gap of F = 0, which any d within p of g0 bounds. Where the support cancels v is a direction of
  // rounding, and gives way to the least v >= 0 with g_j'd >= 0, d = g0 + p J'v: the d nearest to g0, by the
  // active-set method of Lawson and Hanson.
  MTL_HD double gap_at_zero(bool cancels, int cap) {
    value_ = 0.0;
    if (cancels) {
      for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
        v_[i] = product_[i] = 0.0;
        state_[i] = 0;
      }
      team_.sync();
      size_ = 0;
      noise_ = length_ = 0.0;
      double best = 0.0;
      MTL_NO_UNROLL
      for (int iterations = 0; iterations < cap; ++iterations) {
        const int entering = find_violation();
        if (entering < 0) break;
        enter(entering);
        for (;;) {
          for (int k = team_.rank(); k < size_; k += team_.size()) target_[k] = -forward_b_[k] / radius_;
          team_.sync();
          factor_.back_substitute(team_, size_, target_);
          if (!move(false)) break;
        }
        multiply(ridge_);
        double change = 0.0, length = 0.0;
        for (int k = team_.rank(); k < size_; k += team_.size()) {
          const int i = support_[k];
          change += v_[i] * (b_[i] / radius_ + 0.5 * product_[i]);
          length += v_[i];
        }
        change = team_.sum(change);
        length_ = team_.sum(length);
        if (change < best) forget_entries();
        best = change < best ? change : best;
      }
      multiply(0.0);
    }
    return gap();
  }

  // Steps of Newton's method on the support, without the ridge but in its factor, as long as the gap falls.
  MTL_HD double refine() {
    evaluate(0.0);
    double least = gap();
    save();
    MTL_NO_UNROLL
    for (int step = 0; step < 3; ++step) {
      solve_residual();
      for (int k = team_.rank(); k < size_; k += team_.size()) {
        const double moved = v_[support_[k]] + target_[k];
        v_[support_[k]] = moved > 0.0 ? moved : 0.0;
      }
      team_.sync();
      evaluate(0.0);
      const double found = gap();
      if (!(fabs(value_) <= DBL_MAX && found < least)) break;
      least = found;
      save();
    }
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) v_[i] = best_[i];
    team_.sync();
    return least;
  }

  // target_ = C^-1 (value_ a - b - p product_) / p on the support.
  MTL_HD void solve_residual() {
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      const int i = support_[k];
      target_[k] = (a_[i] * value_ - b_[i]) / radius_ - product_[i];
    }
    team_.sync();
    factor_.forward_substitute(team_, size_, target_);
    factor_.back_substitute(team_, size_, target_);
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

  // Factors support_[size_], which must already be there.
  MTL_HD void append(int task) {
    const int n = size_++;
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
    const int n = size_;
    size_ = position;
    while (size_ < n) append(support_[size_]);
  }

  // product_ = (C + ridge I) v.
  MTL_HD void multiply(double ridge) {
    for (int k = team_.rank(); k < size_; k += team_.size())
      column_[k] = v_[support_[k]] * inverse_norm_[support_[k]];
    team_.sync();
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      double total = 0.0;
      if (inverse_norm_[j] > 0.0) {
        for (int k = 0; k < size_; ++k) total += scale_ * p_.row(support_[k])[j] * column_[k];
      }
      product_[j] = total * inverse_norm_[j] + ridge * v_[j];
    }
    team_.sync();
  }

  // F(v), and what rounding makes of it; v and product_ are scaled to v'(C + ridge I)v = 1.
  MTL_HD void evaluate(double ridge) {
    multiply(ridge);
    double squares = 0.0, own = 0.0;
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      const double v = v_[support_[k]];
      squares += v * product_[support_[k]];
      own += v * v;
    }
    squares = team_.sum(squares);
    own = ridge_ * team_.sum(own);
    const double inverse = 1.0 / sqrt(squares > own ? squares : own);
    double share = 0.0, slope = 0.0, slopes = 0.0, length = 0.0;
    for (int k = team_.rank(); k < size_; k += team_.size()) {
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
    noise_ = rounding() * (slopes + radius_ * (1.0 + 0.5 * length_ * length_)) / share;
  }

  MTL_HD double rounding() const { return 2.0 * DBL_EPSILON; }

  // The task whose g_j'd lies furthest below F, if by more than rounding; -1 when there is none.
  MTL_HD int find_violation() const {
    IndexedValue worst = {0.0, -1};
    for (int j = team_.rank(); j < num_tasks_; j += team_.size()) {
      if (inverse_norm_[j] == 0.0 || state_[j] != 0) continue;
      const double residual = b_[j] + radius_ * product_[j] - a_[j] * value_;
      if (residual >= -rounding() * (fabs(b_[j]) + radius_ * length_) - a_[j] * noise_) continue;
      worst = lesser(worst, {residual / a_[j], j});
    }
    return team_.argmin(worst.value, worst.index).index;
  }

  MTL_HD void enter(int task) {
    if (team_.rank() == 0) {
      support_[size_] = task;
      state_[task] |= kInSupport | kEntered;
    }
    team_.sync();
    append(task);
  }

  // Adds a row, then moves to where F is least over the support, dropping the rows whose v would turn
  // negative on the way.
  MTL_HD void improve_with(int entering) {
    enter(entering);
    while (size_ > 1) {
      const bool bounded = find_minimizer();
      if (!move(!bounded)) return;
    }
    if (team_.rank() == 0) v_[support_[0]] = 1.0;
    team_.sync();
  }

  // Moves v to target_, or along it, until the first v reaches 0, whose row leaves. Returns whether one did.
  MTL_HD bool move(bool along) {
    IndexedValue leaving = {0.0, -1};
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      if (along ? target_[k] >= 0.0 : target_[k] > 0.0) continue;
      const double v = v_[support_[k]];
      const double step = v > 0.0 ? v / (along ? -target_[k] : v - target_[k]) : 0.0;
      leaving = lesser(leaving, {step, k});
    }
    leaving = team_.argmin(leaving.value, leaving.index);
    const double step = leaving.index >= 0 ? leaving.value : along ? 0.0 : 1.0;
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      const double v = v_[support_[k]];
      const double moved =
          step == 1.0 && !along ? target_[k] : v + step * (along ? target_[k] : target_[k] - v);
      v_[support_[k]] = moved > 0.0 && k != leaving.index ? moved : 0.0;
    }
    team_.sync();
    if (leaving.index < 0) return false;
    remove(leaving.index);
    factor_from(leaving.index);
    return true;
  }

  // target_: where F is least over the support, as long as v on the sphere; or, returning false, the
  // direction in which it falls without end.
  MTL_HD bool find_minimizer() {
    double aa = 0.0, ab = 0.0;
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      aa += forward_a_[k] * forward_a_[k];
      ab += forward_a_[k] * forward_b_[k];
    }
    aa = team_.sum(aa);
    const double h = team_.sum(ab) / aa;
    double squares = 0.0;
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      const double steepest = h * forward_a_[k] - forward_b_[k];
      squares += steepest * steepest;
    }
    squares = team_.sum(squares);
    const double left = radius_ * radius_ - squares;
    const bool bounded = left > 0.0;
    const double factor = bounded ? h + sqrt(left / aa) : h;
    for (int k = team_.rank(); k < size_; k += team_.size())
      target_[k] = (factor * forward_a_[k] - forward_b_[k]) / (bounded ? radius_ : 1.0);
    team_.sync();
    factor_.back_substitute(team_, size_, target_);
    return bounded;
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
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) best_[i] = v_[i];
    team_.sync();
  }

  MTL_HD void restore() {
    int size = 0;
    for (int i = 0; i < num_tasks_; ++i) {
      const bool inside = best_[i] > 0.0;
      if (i % team_.size() == team_.rank()) {
        v_[i] = best_[i];
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

  const Team& team_;
  const Problem& p_;
  int num_tasks_, num_active_;
  double scale_, ridge_;
  PackedCholesky factor_;
  double *inverse_norm_, *a_, *b_, *v_, *target_, *product_, *column_, *forward_a_, *forward_b_;
  double* best_;
  int* support_;
  int* state_;
  int size_ = 0;
  bool has_zero_row_ = false;
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
