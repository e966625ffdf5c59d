#pragma once

// What the kernels read about the rows: one array of 64-bit words in device memory, built by plan.cpp.

#include <cstdint>

namespace mtl::cuda {

// The columns of one parameter, cut into tiles that are numbered on from `first_tile` in its list.
struct Span {
  std::int64_t param;
  std::int64_t first_tile;
  std::int64_t columns;
};

// Every `stride`-th tile, from `first_tile` on, of a list of spans of one group and one dtype: what one block
// sums up on its own. Blocks side by side thus read memory side by side.
struct Slice {
  std::int64_t first_span;
  std::int64_t num_spans;
  std::int64_t first_tile;
  std::int64_t stride;
  std::int64_t num_tiles;  // of the whole list
  std::int64_t columns;    // of the whole list
  std::int64_t group;
  std::int64_t pod;
};

// Neighbouring slices of a group, whose last one to finish adds up all of them, in the order of their
// numbers.
struct Pod {
  std::int64_t first_slice;
  std::int64_t num_slices;
};

// The pods of a group, likewise.
struct GroupPods {
  std::int64_t first_pod;
  std::int64_t num_pods;
};

}  // namespace mtl::cuda
