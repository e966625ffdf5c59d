#pragma once

// PCGrad in Gram space (Yu et al. 2020, arXiv 2001.06782, Algorithm 1): the projected gradient of task i is
// J' c_i, and what a projection needs of it is v = G c_i. Each task j != i is met once; if v_j < 0: c_ij -=
// v_j / G_jj. w = sum_i c_i.
//   options: {random order (0/1), mean over the active tasks (0/1)}
//   rng: {seed, step}, read only when the order is random
//   certificate: {0, 0}
// Random order: task i of problem b meets j != i by ascending key (word & ~127) | j, where word is j % 4 of
// the Philox position (b, i*32 + j/4). The low bits make keys distinct, so every backend sorts them alike.
//
// v_j / G_jj overflows where norms differ by more than about 1e308. Weights are then inf or nan: a host
// refuses them, a GPU lets them reach the gradient, where found_inf and checks for finite gradients see them.

#include "mtl_kernels/philox.h"
#include "mtl_kernels/solver.h"

namespace mtl {

struct Pcgrad {
  static constexpr const char* name = "pcgrad";
  static constexpr int num_options = 2;
  MTL_HD static bool needs_rng(const double* options) { return options[0] != 0.0; }

  static constexpr bool independent_rows = true;

  // The coefficients c_ij (131 KB at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    return static_cast<std::size_t>(num_tasks) * static_cast<std::size_t>(num_tasks);
  }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    for (int i = team.squad(); i < p.num_tasks; i += team.num_squads()) {
      if (p.is_active(i))
        Projection<Team>(team, p, i)
            .run(num_active - 1, p.scratch + static_cast<std::ptrdiff_t>(i) * p.num_tasks);
    }
    team.sync();
    const double scale = p.options[1] != 0.0 ? 1.0 / num_active : 1.0;
    for (int j = team.rank(); j < p.num_tasks; j += team.size()) {
      double total = 0.0;
      if (p.is_active(j)) {
        for (int i = 0; i < p.num_tasks; ++i) {
          if (p.is_active(i)) total += p.scratch[static_cast<std::ptrdiff_t>(i) * p.num_tasks + j];
        }
      }
      p.weights[j] = total * scale;
    }
    set_certificate(team, p, 0.0, 0);
    team.sync();
  }

 private:
  static constexpr unsigned kMet = ~0u;  // also a key, but then the last one

  // One task's gradient on its way past the others, in the lanes of a squad.
  template <class Team>
  class Projection {
   public:
    MTL_HD Projection(const Team& team, const Problem& p, int task)
        : team_(team), p_(p), task_(task), first_(team.lane() * kPart) {
      const int left = p.num_tasks - first_;
      own_ = left < 0 ? 0 : left < kPart ? left : kPart;
      const bool random = needs_rng(p.options);
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

    MTL_HD void run(int others, double* coefficients) {
      for (int n = 0; n < others; ++n) {
        const int j = next(n);
        const double* other = p_.row(j);
        const double product = element(j);
        const bool conflict = product < 0.0 && other[j] > 0.0;
        const double factor = conflict ? product / other[j] : 0.0;
        if (conflict) {
          for (int s = 0; s < bound(); ++s)
            if (kSerial || s < own_) v_[s] -= factor * other[first_ + s];
        }
        if (j / kPart == team_.lane()) coefficients[j] = conflict ? -factor : 0.0;
      }
      if (task_ / kPart == team_.lane()) coefficients[task_] = 1.0;
    }

   private:
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
      return team_.from_lane(x, j / kPart);
    }

    const Team& team_;
    const Problem& p_;
    int task_, first_, own_;  // elements first_ .. first_ + own_ are this lane's
    double v_[kPart];         // G c_i
    unsigned keys_[kPart];    // of the tasks that are still to be met
  };
};

}  // namespace mtl
