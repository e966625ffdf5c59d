#pragma once

#include <vector>

#include "combine_kernels.h"
#include "device.h"
#include "mtl_kernels/rows.h"
#include "plan.h"
#include "words.h"

namespace mtl::cuda {

// What is made of the K values of a column.
enum class Combination { kWeightedSum, kGradDrop, kLeakyGradDrop, kTrimmedMean };

// Everything about a launch that follows from sizes, as GramPlan.
class CombinePlan {
 public:
  // `outputs`: the dtype of each parameter's output, which only a weighted sum may have another one than its
  // rows of; -1 for none. The pointers of `rows` are not looked at.
  CombinePlan(int device, const RowTable& rows, int num_groups, const std::vector<int>& outputs,
              Combination combination = Combination::kWeightedSum);

  const std::vector<std::int64_t>& words() const { return words_.all(); }

 private:
  friend struct CombineCall;
  CombineKernel kernel_of(int kind) const;

  Combination combination_;
  int device_, num_tasks_;
  bool slow_double_;
  std::int64_t num_params_;
  Plan plan_;
  Words words_;
  std::size_t tiles_at_, slices_at_, first_elements_at_;
  std::vector<std::int64_t> blocks_;  // by part
};

// One call: all pointers but the plan are device memory. An output may be one of the parameter's rows, unless
// it is added to, but may not overlap any other row or output.
struct CombineCall {
  const CombinePlan& plan;
  const std::uintptr_t* pointers;  // [K, P]
  const std::uintptr_t* outputs;   // [P]
  const std::int64_t* words;
  const double* weights;  // [groups, K], what a row leaks, or nullptr
  const double* scale;    // or nullptr
  float* found_inf;       // or nullptr
  bool accumulate;
  const std::int64_t* rng = nullptr;  // of GradDrop
  int trim = 0;                       // of the trimmed mean

  // One launch for each pair of dtypes among rows and outputs.
  void run(cudaStream_t stream) const;
};

}  // namespace mtl::cuda
