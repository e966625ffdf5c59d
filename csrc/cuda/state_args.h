#pragma once

#include "device.h"
#include "meeting.h"
#include "mtl_kernels/elementwise.h"
#include "tables.h"

namespace mtl::cuda {

// One launch of a kernel that updates the states of rows: slices of one dtype of rows and one of states. A
// row and its state stand alone here: the parameter of a tile is k P + p, and its group `group` K + k.
struct StateArgs {
  const std::uintptr_t* rows;    // [K, P], 0 = the task does not reach the parameter
  const std::uintptr_t* states;  // [K, P], 0 = there is none
  const Tile* tiles;
  const Slice* slices;
  std::int64_t first_slice;
  std::int64_t num_slices;
  Meeting meeting;  // one sum each
  StateCall call;
  double* sums;  // [groups][K]
};

}  // namespace mtl::cuda
