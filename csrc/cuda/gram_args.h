#pragma once

#include "device.h"
#include "meeting.h"
#include "solver_call.h"
#include "tables.h"

namespace mtl::cuda {

// One launch of a gram kernel: the slices [first_slice, first_slice + num_slices), all of one dtype.
struct GramArgs {
  int num_tasks;
  std::int64_t num_params;
  const std::uintptr_t* pointers;  // [K, P], 0 = the task does not reach the parameter
  const Tile* tiles;
  const Slice* slices;
  std::int64_t num_groups;
  std::int64_t first_slice;
  std::int64_t num_slices;
  Meeting meeting;     // sums of pairs, (i, j <= i) at i (i + 1) / 2 + j
  unsigned* arrivals;  // of groups
  double* gram;        // [groups][K][K]
  double* norms;       // [groups][K], or nullptr with cosines
  double* cosines;     // [groups][K][K]
  SolverCall solver;   // its gram is the one above
};

// 16-bit rows of a group with fewer columns are summed in double throughout: too few sums in float for their
// rounding errors to cancel, and nothing to gain.
constexpr std::int64_t kFloatColumns = 1 << 15;

__device__ __host__ constexpr int num_pairs(int num_tasks) { return num_tasks * (num_tasks + 1) / 2; }

}  // namespace mtl::cuda
