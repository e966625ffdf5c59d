#pragma once

// Eigenvalues and eigenvectors of a symmetric matrix A by Jacobi's method: rotations of two rows and columns
// p, q at a time make A diagonal, and turn the unit matrix into the eigenvectors.
//
// A round rotates disjoint pairs at once, so that a team has work for all its ranks; the rounds of a sweep
// meet every pair once. Nothing is added up across ranks, so that teams of every size find the same.
//
// A pair is left alone once |A_pq| <= eps sqrt(A_pp A_qq), which keeps the small eigenvalues of a positive
// definite A as accurate as a scaling of A to unit diagonal lets them be (Demmel & Veselic, "Jacobi's method
// is more accurate than QR", 1992). A_pp below eps counts as eps here: callers scale A to about 1, and take
// for zero what is less than that.

#include <cfloat>
#include <cstddef>

#include "mtl_kernels/solver.h"

namespace mtl {

// The eigenvalues that count.
struct Kept {
  int count;
  double least, largest, sum;
};

template <class Team>
class Jacobi {
 public:
  static constexpr int kMaxSweeps = 30;  // 5 to 10 are needed, up to 17 where A is singular

  // A, the eigenvectors, the eigenvalues, and the angles of a round.
  MTL_HD static constexpr std::size_t scratch_doubles(int size) {
    const std::size_t n = static_cast<std::size_t>(size);
    return 2 * n * n + 2 * n + 1;
  }

  MTL_HD Jacobi(const Team& team, int size, double* scratch)
      : team_(team), size_(size), num_rounds_(size % 2 == 0 ? size - 1 : size), matrix_(opaque(scratch)) {
    const std::ptrdiff_t entries = static_cast<std::ptrdiff_t>(size) * size;
    vectors_ = matrix_ + entries;
    values_ = vectors_ + entries;
    cosines_ = values_ + size;
    sines_ = cosines_ + (size + 1) / 2;
  }

  // Row i of A, for the caller to fill before run().
  MTL_HD double* row(int i) const { return matrix_ + static_cast<std::ptrdiff_t>(i) * size_; }

  // Returns the number of sweeps. The caller has filled A; no barrier is needed in between.
  MTL_HD int run() {
    team_.sync();
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      values_[i] = row(i)[i];
      for (int j = 0; j < size_; ++j) own_vector(i)[j] = i == j ? 1.0 : 0.0;
    }
    team_.sync();
    int sweeps = 0;
    for (bool rotated = true; rotated && sweeps < kMaxSweeps; sweeps += rotated) {
      rotated = false;
      MTL_NO_UNROLL
      for (int round = 0; round < num_rounds_; ++round) rotated = rotate_pairs(round) || rotated;
    }
    team_.sync();
    return sweeps;
  }

  MTL_HD double value(int i) const { return values_[i]; }             // in no order
  MTL_HD const double* vector(int i) const { return own_vector(i); }  // of length 1

  // What is left off the diagonal, relative to all of A: no eigenvalue is further off than that.
  MTL_HD double residual() const {
    double off = 0.0, on = 0.0;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      on += values_[i] * values_[i];
      MTL_NO_UNROLL
      for (int j = 0; j < size_; ++j) off += j == i ? 0.0 : row(i)[j] * row(i)[j];
    }
    off = team_.sum(off);
    on = team_.sum(on);
    return off > 0.0 ? sqrt(off / (off + on)) : 0.0;
  }

  // Sets the eigenvalues up to `share` of the largest one to zero.
  MTL_HD Kept keep_above(double share) {
    Kept kept = {0, 0.0, 0.0, 0.0};
    for (int i = 0; i < size_; ++i) kept.largest = values_[i] > kept.largest ? values_[i] : kept.largest;
    const double cut = share * kept.largest;
    team_.sync();
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      if (!(values_[i] > cut)) values_[i] = 0.0;
    }
    team_.sync();
    for (int i = 0; i < size_; ++i) {
      if (!(values_[i] > 0.0)) continue;
      kept.least = kept.count == 0 || values_[i] < kept.least ? values_[i] : kept.least;
      kept.sum += values_[i];
      ++kept.count;
    }
    return kept;
  }

  // The position-th smallest of the eigenvalues above zero.
  MTL_HD double ordered_value(int position) const {
    double found = 0.0;
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      if (!(values_[i] > 0.0)) continue;
      int below = 0;
      MTL_NO_UNROLL
      for (int j = 0; j < size_; ++j)
        below += values_[j] > 0.0 && (values_[j] < values_[i] || (values_[j] == values_[i] && j < i));
      if (below == position) found = values_[i];
    }
    return -team_.min(-found);
  }

  // out_i = v_i'b on the eigenvectors of values above zero, 0 on the others.
  MTL_HD void project(const double* b, double* out) const {
    for (int i = team_.rank(); i < size_; i += team_.size()) {
      double total = 0.0;
      if (values_[i] > 0.0) {
        MTL_NO_UNROLL
        for (int k = 0; k < size_; ++k) total += own_vector(i)[k] * b[k];
      }
      out[i] = total;
    }
    team_.sync();
  }

  // out = sum_i coefficient_i v_i.
  MTL_HD void combine(const double* coefficients, double* out) const {
    for (int k = team_.rank(); k < size_; k += team_.size()) {
      double total = 0.0;
      MTL_NO_UNROLL
      for (int i = 0; i < size_; ++i) total += coefficients[i] * own_vector(i)[k];
      out[k] = total;
    }
    team_.sync();
  }

 private:
  MTL_HD double* own_vector(int i) const { return vectors_ + static_cast<std::ptrdiff_t>(i) * size_; }

  // The pairs of a round stand symmetrically about row `round` in a circle of an odd number of rows. Pair 0
  // is that row with the one left over where the size is even, and else with itself.
  MTL_HD int num_pairs() const { return (num_rounds_ + 1) / 2; }
  MTL_HD int ahead(int round, int pair) const {
    const int p = round + pair;
    return p < num_rounds_ ? p : p - num_rounds_;
  }
  MTL_HD int behind(int round, int pair) const {
    if (pair == 0) return num_rounds_ < size_ ? size_ - 1 : round;
    const int q = round - pair;
    return q < 0 ? q + num_rounds_ : q;
  }

  MTL_HD bool rotate_pairs(int round) {
    bool any = false;
    for (int pair = team_.rank(); pair < num_pairs(); pair += team_.size())
      any = find_rotation(ahead(round, pair), behind(round, pair), pair) || any;
    if (!team_.any(any)) return false;
    for (int pair = team_.squad(); pair < num_pairs(); pair += team_.num_squads()) {
      if (sines_[pair] == 0.0) continue;
      const int p = ahead(round, pair), q = behind(round, pair);
      rotate_rows(row(p), row(q), cosines_[pair], sines_[pair]);
      rotate_rows(own_vector(p), own_vector(q), cosines_[pair], sines_[pair]);
    }
    team_.sync();
    for (int i = team_.squad(); i < size_; i += team_.num_squads()) rotate_columns(row(i), round);
    team_.sync();
    // Up to rounding it is there. No barrier follows: the next round looks at other entries, and has one
    // before it rotates.
    for (int pair = team_.rank(); pair < num_pairs(); pair += team_.size()) {
      const int p = ahead(round, pair), q = behind(round, pair);
      if (sines_[pair] != 0.0) row(p)[q] = row(q)[p] = 0.0;
    }
    return true;
  }

  // The angle that makes A_pq zero, and the diagonal it leads to. Returns false where A_pq is as good as
  // zero.
  MTL_HD bool find_rotation(int p, int q, int pair) {
    const double off = row(p)[q], a = values_[p], b = values_[q];
    const double scale = sqrt(at_least_epsilon(a) * at_least_epsilon(b));
    if (p == q || !(fabs(off) > DBL_EPSILON * scale)) {
      cosines_[pair] = 1.0;
      sines_[pair] = 0.0;
      return false;
    }
    const double ratio = (b - a) / (2.0 * off);
    const double size = 1.0 / (fabs(ratio) + sqrt(1.0 + ratio * ratio));
    const double tangent = ratio < 0.0 ? -size : size;
    cosines_[pair] = 1.0 / sqrt(1.0 + tangent * tangent);
    sines_[pair] = tangent * cosines_[pair];
    values_[p] = a - tangent * off;
    values_[q] = b + tangent * off;
    return true;
  }

  MTL_HD static double at_least_epsilon(double x) { return fabs(x) > DBL_EPSILON ? fabs(x) : DBL_EPSILON; }

  MTL_HD void rotate_rows(double* __restrict__ x, double* __restrict__ y, double cosine, double sine) const {
    for (int j = team_.lane(); j < size_; j += Team::kLanes) {
      const double xj = x[j], yj = y[j];
      x[j] = cosine * xj - sine * yj;
      y[j] = sine * xj + cosine * yj;
    }
  }

  // The entries of a row by all pairs of columns, in runs of which one end counts up and the other down.
  MTL_HD void rotate_columns(double* x, int round) const {
    if (team_.lane() == 0 && sines_[0] != 0.0) {
      const double xj = x[round], yj = x[size_ - 1];
      x[round] = cosines_[0] * xj - sines_[0] * yj;
      x[size_ - 1] = sines_[0] * xj + cosines_[0] * yj;
    }
    const int end = num_pairs(), turn = round < end - 1 ? round + 1 : num_rounds_ - round;
    const int middle = turn < end ? turn : end;
    rotate_run(x + ahead(round, 1), x + behind(round, 1), 1, middle);
    rotate_run(x + ahead(round, middle), x + behind(round, middle), middle, end);
  }

  MTL_HD void rotate_run(double* __restrict__ x, double* __restrict__ y, int begin, int end) const {
    const double* __restrict__ cosines = cosines_ + begin, * __restrict__ sines = sines_ + begin;
    for (int i = team_.lane(); i < end - begin; i += Team::kLanes) {
      const double xi = x[i], yi = y[-i];
      x[i] = cosines[i] * xi - sines[i] * yi;
      y[-i] = sines[i] * xi + cosines[i] * yi;
    }
  }

  const Team& team_;
  int size_, num_rounds_;
  double *matrix_, *vectors_, *values_, *cosines_, *sines_;
};

}  // namespace mtl
