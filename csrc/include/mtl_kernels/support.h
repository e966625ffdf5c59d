#pragma once

// The support of an active-set method: the tasks whose variable may be positive, in the order in which they
// entered, which is that of the factor; and a state of every task.

#include "mtl_kernels/solver.h"

namespace mtl {

template <class Team>
class Support {
 public:
  // Bits. A task that has entered does not enter again until `forget_entries`, so that rounding cannot make a
  // cycle.
  enum State : int { kInside = 1, kEntered = 2, kExcluded = 4 };

  // `memory` is for two vectors of int: as many doubles as there are tasks.
  MTL_HD Support(const Team& team, int num_tasks, double* memory)
      : team_(team),
        num_tasks_(num_tasks),
        tasks_(reinterpret_cast<int*>(memory)),
        state_(tasks_ + num_tasks) {}

  MTL_HD int size() const { return size_; }
  MTL_HD int operator[](int place) const { return tasks_[place]; }
  MTL_HD int state(int task) const { return state_[task]; }

  // Each rank its own tasks, as in all loops over tasks; then comes a barrier of the caller's.
  MTL_HD void set_state(int task, int state) { state_[task] = state; }
  MTL_HD void clear() { size_ = 0; }

  // At the end. Its state is written behind a barrier, for other ranks may be asking for it still, and seen
  // behind the next one, of the factor.
  MTL_HD void enter(int task, int state = kInside | kEntered) {
    if (team_.rank() == 0) tasks_[size_] = task;
    ++size_;
    team_.sync();
    if (team_.rank() == 0) state_[task] |= state;
  }

  MTL_HD void remove(int place) {
    if (team_.rank() == 0) {
      state_[tasks_[place]] &= ~kInside;
      for (int k = place; k + 1 < size_; ++k) tasks_[k] = tasks_[k + 1];
    }
    --size_;
    team_.sync();
  }

  // The tasks with a positive value.
  MTL_HD void restore(const double* values) {
    int size = 0;
    for (int i = 0; i < num_tasks_; ++i) {
      const bool inside = values[i] > 0.0;
      if (i % team_.size() == team_.rank()) {
        state_[i] = (state_[i] & ~kInside) | (inside ? kInside : 0);
        if (inside) tasks_[size] = i;
      }
      size += inside;
    }
    size_ = size;
    team_.sync();
  }

  MTL_HD void forget_entries() {
    for (int i = team_.rank(); i < num_tasks_; i += team_.size()) state_[i] &= ~kEntered;
    team_.sync();
  }

 private:
  const Team& team_;
  int num_tasks_;
  int* tasks_;
  int* state_;
  int size_ = 0;
};

}  // namespace mtl
