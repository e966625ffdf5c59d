#pragma once

// Gradient surgery in Gram space: task i's gradient on its way past the others. It is J'c_i, c_i = e_i at
// first, and meets every other active task j once, where a multiple of the original g_j is added to it. What
// tells how much is v = G c_i. w = sum_i c_i.
//
// Random order: task i of problem b meets j != i by ascending key (word & ~127) | j, where word is j % 4 of
// the Philox position (b, i*32 + j/4). The low bits make keys distinct, so every backend sorts them alike.

#include "mtl_kernels/philox.h"
#include "mtl_kernels/solver.h"

namespace mtl {

// One task, in the lanes of a squad.
template <class Team>
class Passage {
 public:
  MTL_HD Passage(const Team& team, const Problem& p, int task, bool random)
      : team_(team), p_(p), task_(task), first_(team.lane() * kPart) {
    const int left = p.num_tasks - first_;
    own_ = left < 0 ? 0 : left < kPart ? left : kPart;
    Philox4 words{};
    if (!kSerial) {
      for (int s = 0; s < kPart; ++s) {
        v_[s] = 0.0;
        keys_[s] = kMet;
      }
    }
    for (int s = 0; s < bound(); ++s) {
      const int j = first_ + s;
      if (!kSerial && s >= own_) continue;
      if (random && s % 4 == 0)
        words = philox_at(p.rng, static_cast<std::uint32_t>(p.index),
                          static_cast<std::uint32_t>(task * 32 + j / 4));
      const unsigned key = (random ? words.word[s % 4] & ~127u : 0u) | static_cast<unsigned>(j);
      keys_[s] = j != task && p.is_active(j) ? key : kMet;
      v_[s] = p.row(task)[j];
    }
    if (kSerial) sort_keys();
  }

  // Leaves c_i in `coefficients`. `multiple(j, product)` is of g_j, where g_j' J'c_i is the product; all
  // lanes of the squad ask for it.
  template <class Multiple>
  MTL_HD void run(int others, double* coefficients, Multiple& multiple) {
    for (int n = 0; n < others; ++n) {
      const int j = next(n);
      const double* other = p_.row(j);
      const double more = multiple(j, element(j));
      if (more != 0.0) {
        for (int s = 0; s < bound(); ++s)
          if (kSerial || s < own_) v_[s] += more * other[first_ + s];
      }
      if (owns(j)) coefficients[j] = more;
    }
    if (owns(task_)) coefficients[task_] = 1.0;
  }

  // Whether this lane keeps what belongs to task j.
  MTL_HD bool owns(int j) const { return j / kPart == team_.lane(); }

  // x of the lane that owns j.
  MTL_HD double from_owner(double x, int j) const { return team_.from_lane(x, j / kPart); }

 private:
  static constexpr unsigned kMet = ~0u;  // also a key, but then the last one
  static constexpr bool kSerial = Team::kLanes == 1;
  static constexpr int kPart = kMaxTasks / Team::kLanes;
  static_assert(kPart % 4 == 0, "a lane uses all words of its Philox positions");

  // Where loops over the own elements end: a constant for a squad, whose elements are then in registers.
  MTL_HD int bound() const { return kSerial ? own_ : kPart; }

  // The n-th task in the order of the keys. A squad finds it among those that are left; a single lane has
  // sorted them.
  MTL_HD int next(int n) {
    if (kSerial) return static_cast<int>(keys_[n] & 127u);
    unsigned least = kMet;
    for (int s = 0; s < kPart; ++s) least = keys_[s] < least ? keys_[s] : least;
    least = team_.least(least);
    for (int s = 0; s < kPart; ++s) keys_[s] = keys_[s] == least ? kMet : keys_[s];
    return static_cast<int>(least & 127u);
  }

  MTL_HD void sort_keys() {
    for (int n = 1; n < own_; ++n) {
      const unsigned key = keys_[n];
      int at = n;
      for (; at > 0 && keys_[at - 1] > key; --at) keys_[at] = keys_[at - 1];
      keys_[at] = key;
    }
  }

  // v_j, from the lane that keeps it.
  MTL_HD double element(int j) const {
    double x = v_[0];
    if (kSerial) {
      x = v_[j];
    } else {
      for (int s = 1; s < kPart; ++s) x = j % kPart == s ? v_[s] : x;
    }
    return from_owner(x, j);
  }

  const Team& team_;
  const Problem& p_;
  int task_, first_, own_;  // elements first_ .. first_ + own_ are this lane's
  double v_[kPart];         // G c_i
  unsigned keys_[kPart];    // of the tasks that are still to be met
};

// p.weights: factor * sum_i c_i, of the coefficients c_ij.
template <class Team>
MTL_HD void add_up(const Team& team, const Problem& p, const double* coefficients, double factor) {
  for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
    double total = 0.0;
    if (p.is_active(j)) {
      for (int i = 0; i < p.num_tasks; ++i) {
        if (p.is_active(i)) total += coefficients[static_cast<std::ptrdiff_t>(i) * p.num_tasks + j];
      }
    }
    p.weights[j] = total * factor;
  }
  team.sync();
}

}  // namespace mtl
