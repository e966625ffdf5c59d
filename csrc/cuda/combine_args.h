#pragma once

#include "device.h"
#include "tables.h"

namespace mtl::cuda {

// One launch of a combine kernel: slices of one dtype of rows and one of output.
struct CombineArgs {
  int num_tasks;
  std::int64_t num_params;
  const std::uintptr_t* pointers;  // [K, P] rows, 0 = the task does not reach the parameter
  const std::uintptr_t* outputs;   // [P]
  const Tile* tiles;
  const Slice* slices;
  std::int64_t first_slice;
  std::int64_t num_slices;
  const double* weights;  // [groups][K]
  const double* scale;    // one factor for all weights, or nullptr
  float* found_inf;       // set to 1 if anything written is not finite, or nullptr
  bool accumulate;        // add to the output instead of replacing it
};

}  // namespace mtl::cuda
