#pragma once

#include <vector>

#include "device.h"
#include "mtl_kernels/rows.h"
#include "plan.h"
#include "state_kernels.h"
#include "words.h"

namespace mtl::cuda {

// Everything about an update of states that follows from sizes, as GramPlan.
class StatePlan {
 public:
  // `states`: sizes, dtypes and groups of the states. The pointers are not looked at.
  StatePlan(int device, const RowTable& states, const std::vector<DType>& row_dtypes, int num_groups,
            StateOperation operation);

  const std::vector<std::int64_t>& words() const { return words_.all(); }
  std::int64_t sum_doubles() const;   // of workspace
  std::int64_t num_counters() const;  // 32-bit, zero before the first launch

 private:
  friend struct StateUpdate;
  StateKernel kernel_of(int kind) const;

  int device_;
  StateOperation operation_;
  Plan plan_;
  Words words_;
  std::size_t tiles_at_, slices_at_, groups_at_;
  std::vector<std::int64_t> blocks_;  // by part
};

// One call: all pointers but the plan are device memory.
struct StateUpdate {
  const StatePlan& plan;
  const std::uintptr_t* rows;    // [K, P]
  const std::uintptr_t* states;  // [K, P]
  const std::int64_t* words;
  double* workspace;
  unsigned* counters;
  StateCall call;  // of the operation of the plan
  double* sums;    // [groups, K], every one of them written

  // One launch for each pair of dtypes among rows and states.
  void run(cudaStream_t stream) const;
};

}  // namespace mtl::cuda
