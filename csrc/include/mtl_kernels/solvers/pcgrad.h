#pragma once

// PCGrad in Gram space (Yu et al. 2020, arXiv 2001.06782, Algorithm 1): the projected gradient of task i is
// J' c_i, and what a projection needs of it is v = G c_i. Each task j != i is met once; if v_j < 0: c_ij -=
// v_j / G_jj. w = sum_i c_i.
//   options: {random order (0/1), mean over the active tasks (0/1)}
//   rng: {seed, step}, read only when the order is random
//   certificate: {0, 0}
// Random order: task i of problem b meets j != i by ascending key (word & ~127) | j, where word is j % 4 of
// the Philox position (b, i*32 + j/4). The low bits make keys distinct, so every backend sorts them alike.

#include "mtl_kernels/philox.h"
#include "mtl_kernels/solver.h"

namespace mtl {

struct Pcgrad {
  static constexpr const char* name = "pcgrad";
  static constexpr int num_options = 2;
  MTL_HD static bool needs_rng(const double* options) { return options[0] != 0.0; }

  // K rows of v, and K rows of visiting order in bytes, so that every task may have a rank of its own (147 KB
  // at K = 128).
  MTL_HD static constexpr std::size_t scratch_doubles(int num_tasks) {
    const auto k = static_cast<std::size_t>(num_tasks);
    return k * k + (k * k + 7) / 8;
  }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    const int num_tasks = p.num_tasks;
    const bool random = needs_rng(p.options);
    double* coefficients = p.scratch;
    auto* orders =
        reinterpret_cast<unsigned char*>(p.scratch + static_cast<std::ptrdiff_t>(num_tasks) * num_tasks);
    for (int i = team.rank(); i < num_tasks; i += team.size()) {
      if (!p.is_active(i)) continue;
      const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(i) * num_tasks;
      double* row = coefficients + offset;
      const int others =
          random ? random_order(p, i, row, orders + offset) : fixed_order(p, i, orders + offset);
      project(p, i, orders + offset, others, row);
    }
    team.sync();
    const double scale = p.options[1] != 0.0 ? 1.0 / num_active : 1.0;
    for (int j = team.rank(); j < num_tasks; j += team.size()) {
      double total = 0.0;
      if (p.is_active(j)) {
        for (int i = 0; i < num_tasks; ++i) {
          if (p.is_active(i)) total += coefficients[static_cast<std::ptrdiff_t>(i) * num_tasks + j];
        }
      }
      p.weights[j] = total * scale;
    }
    set_certificate(team, p, 0.0, 0);
    team.sync();
  }

 private:
  MTL_HD static int fixed_order(const Problem& p, int task, unsigned char* order) {
    int count = 0;
    for (int j = 0; j < p.num_tasks; ++j) {
      if (j != task && p.is_active(j)) order[count++] = static_cast<unsigned char>(j);
    }
    return count;
  }

  // `keys` is K doubles of room: a 32-bit key is exact in a double, and the row it stands in is not used yet.
  MTL_HD static int random_order(const Problem& p, int task, double* keys, unsigned char* order) {
    int count = 0;
    for (int first = 0; first < p.num_tasks; first += 4) {
      const auto position = static_cast<std::uint32_t>(task * 32 + first / 4);
      const Philox4 words = philox_at(p.rng, static_cast<std::uint32_t>(p.index), position);
      for (int j = first; j < first + 4 && j < p.num_tasks; ++j) {
        keys[count] = (words.word[j - first] & ~127u) | static_cast<std::uint32_t>(j);
        count += j != task && p.is_active(j);
      }
    }
    for (int n = 1; n < count; ++n) {
      const double key = keys[n];
      int at = n;
      for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
      keys[at] = key;
    }
    for (int n = 0; n < count; ++n)
      order[n] = static_cast<unsigned char>(static_cast<std::uint32_t>(keys[n]) & 127u);
    return count;
  }

  // Fills `row` with c_i. It starts as v; v_j is not needed once j was met, so c_ij takes its place.
  MTL_HD static void project(const Problem& p, int task, const unsigned char* order, int others,
                             double* row) {
    for (int j = 0; j < p.num_tasks; ++j) row[j] = p.row(task)[j];
    for (int n = 0; n < others; ++n) {
      const int j = order[n];
      const double* other = p.row(j);
      if (!(row[j] < 0.0 && other[j] > 0.0)) {
        row[j] = 0.0;
        continue;
      }
      const double factor = row[j] / other[j];
      for (int m = n + 1; m < others; ++m) row[order[m]] -= factor * other[order[m]];
      row[j] = -factor;
    }
    row[task] = 1.0;
  }
};

}  // namespace mtl
