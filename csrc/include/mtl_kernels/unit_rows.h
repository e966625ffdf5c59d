#pragma once

// Rows seen by their directions alone: the least y of those that minimize |C y - b|, C the cosines of the
// rows. J'D y, with D the inverse lengths, is then the shortest of the vectors whose products with the unit
// rows are as near to b as can be.
//
// Zero rows are left out. An eigenvalue of C up to `rtol` of the largest counts as zero: with K rows their
// rounding leaves at most K eps of it (`rtol` below that is taken for it).

#include <cfloat>
#include <cstddef>

#include "mtl_kernels/jacobi.h"

namespace mtl {

template <class Team>
class UnitRows {
 public:
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return Jacobi<Team>::scratch_doubles(num_tasks) + std::size_t{4} * static_cast<std::size_t>(num_tasks);
  }

  MTL_HD UnitRows(const Team& team, const Problem& p, double rtol)
      : team_(team), num_tasks_(p.num_tasks), jacobi_(team, p.num_tasks, p.scratch) {
    lengths_ = p.scratch + Jacobi<Team>::scratch_doubles(num_tasks_);
    nearest_ = lengths_ + num_tasks_;
    image_ = nearest_ + num_tasks_;
    coefficients_ = image_ + num_tasks_;
    for (int i = team_.rank(); i < num_tasks_; i += team_.size())
      lengths_[i] = p.is_active(i) && p.row(i)[i] > 0.0 ? sqrt(p.row(i)[i]) : 0.0;
    team_.sync();
    for (int i = team_.squad(); i < num_tasks_; i += team_.num_squads()) {
      for (int j = team_.lane(); j < num_tasks_; j += Team::kLanes) jacobi_.row(i)[j] = cosine(p, i, j);
    }
    sweeps_ = jacobi_.run();
    residual_ = jacobi_.residual();
    for (int i = 0; i < num_tasks_; ++i) count_ += lengths_[i] > 0.0;
    const double least = count_ * DBL_EPSILON;
    kept_ = jacobi_.keep_above(rtol > least ? rtol : least);
    rounding_ = kept_.count > 0 ? (rtol > least ? rtol : least) * (kept_.largest / kept_.least) : 0.0;
  }

  // Finds y and C y for b, nullptr: all ones. Returns false, and zeros, where C y is nothing but rounding.
  MTL_HD bool solve(const double* b) {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size())
      nearest_[i] = lengths_[i] > 0.0 ? b == nullptr ? 1.0 : b[i] : 0.0;
    team_.sync();
    double whole = 0.0, seen = 0.0;
    for (int i = 0; i < num_tasks_; ++i) whole += nearest_[i] * nearest_[i];
    jacobi_.project(nearest_, coefficients_);
    for (int i = 0; i < num_tasks_; ++i) seen += coefficients_[i] * coefficients_[i];
    const bool found = kept_.count == count_ ? seen > 0.0 : seen > rounding_ * rounding_ * whole;
    team_.sync();
    for (int i = team_.rank(); i < num_tasks_; i += team_.size())
      coefficients_[i] = found ? coefficients_[i] : 0.0;
    team_.sync();
    jacobi_.combine(coefficients_, image_);
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) {
      if (jacobi_.value(i) > 0.0) coefficients_[i] /= jacobi_.value(i);
    }
    team_.sync();
    jacobi_.combine(coefficients_, nearest_);
    return found;
  }

  MTL_HD int count() const { return count_; }  // of rows that are not zero
  MTL_HD double length(int i) const { return lengths_[i]; }
  MTL_HD double nearest(int i) const { return nearest_[i]; }  // y
  MTL_HD double image(int i) const { return image_[i]; }      // C y

  // What the rounding of C may change in the space that the eigenvectors span, as a share of 1; below 1.
  MTL_HD double rounding() const { return rounding_; }

  MTL_HD double residual() const { return residual_; }
  MTL_HD int sweeps() const { return sweeps_; }

 private:
  MTL_HD double cosine(const Problem& p, int i, int j) const {
    if (!(lengths_[i] > 0.0 && lengths_[j] > 0.0)) return 0.0;
    if (i == j) return 1.0;
    const double x = p.row(i)[j] / lengths_[i] / lengths_[j];
    return x > 1.0 ? 1.0 : x < -1.0 ? -1.0 : x;
  }

  const Team& team_;
  int num_tasks_, sweeps_, count_ = 0;
  Jacobi<Team> jacobi_;
  Kept kept_;
  double residual_, rounding_;
  double *lengths_, *nearest_, *image_, *coefficients_;
};

}  // namespace mtl
