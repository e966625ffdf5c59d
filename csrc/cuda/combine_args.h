#pragma once

#include "device.h"
#include "tables.h"

namespace mtl::cuda {

// One launch of a kernel that makes one value of the K values of a column: slices of one dtype of rows and
// one of output.
struct CombineArgs {
  int num_tasks;
  std::int64_t num_params;
  const std::uintptr_t* pointers;  // [K, P] rows, 0 = the task does not reach the parameter
  const std::uintptr_t* outputs;   // [P]
  const Tile* tiles;
  const Slice* slices;
  std::int64_t first_slice;
  std::int64_t num_slices;
  const double* weights;  // [groups][K], or what a row leaks

  // Of combine.
  const double* scale;  // one factor for all weights, or nullptr
  float* found_inf;     // set to 1 if anything written is not finite, or nullptr
  bool accumulate;      // add to the output instead of replacing it

  const std::int64_t* rng;             // of graddrop: seed and step
  const std::int64_t* first_elements;  // [P], the number of each parameter's first element among all
  int trim;                            // of the trimmed mean
};

}  // namespace mtl::cuda
