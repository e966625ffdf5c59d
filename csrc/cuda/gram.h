#pragma once

#include <vector>

#include "device.h"
#include "gram_kernels.h"
#include "mtl_kernels/rows.h"
#include "plan.h"
#include "solve.h"
#include "words.h"

namespace mtl::cuda {

// Everything about a gram launch that follows from sizes: made once, used for as long as they stay the same.
class GramPlan {
 public:
  // The pointers of `rows` are not looked at.
  GramPlan(int device, const RowTable& rows, int num_groups);

  const std::vector<std::int64_t>& words() const { return words_.all(); }  // to be copied to the device
  std::int64_t sum_doubles() const;                                        // of workspace
  std::int64_t num_counters() const;                                  // 32-bit, zero before the first launch
  std::int64_t scratch_doubles(const SolverArguments& solver) const;  // of workspace, 0: none

 private:
  friend struct GramCall;
  GramKernel kernel_of(int kind) const;
  std::size_t shared_bytes(const Part& part, std::int64_t scratch_doubles) const;
  std::int64_t max_blocks() const;

  int device_, num_tasks_;
  bool slow_double_;
  std::int64_t num_params_;
  Plan plan_;
  Words words_;
  std::size_t tiles_at_, slices_at_, groups_at_;
  std::vector<std::int64_t> blocks_;  // by part
};

// One call: all pointers but the plan are device memory.
struct GramCall {
  const GramPlan& plan;
  const std::uintptr_t* pointers;  // [K, P]
  const std::int64_t* words;
  double* sums;
  unsigned* counters;
  double* gram;                   // [groups, K, K]
  double* norms;                  // [groups, K], or nullptr with cosines
  double* cosines;                // [groups, K, K]
  const SolverArguments* solver;  // run on every group's Gram matrix, or nullptr
  double* scratch;

  // One launch for each dtype among the rows. Every element of the outputs is written.
  void run(cudaStream_t stream) const;
};

}  // namespace mtl::cuda
