#pragma once

#include "tables.h"

namespace mtl::cuda {

// Where the blocks of a launch meet.
struct Meeting {
  const GroupPods* groups;
  double* slice_sums;      // [slices][width]
  double* pod_sums;        // [pods][width]
  unsigned* pod_arrivals;  // [pods], zero before and after every launch
  unsigned* group_arrivals;
};

}  // namespace mtl::cuda
