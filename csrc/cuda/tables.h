#pragma once

// What the kernels read about the rows: one array of 64-bit words in device memory, built by plan.cpp.

#include <cstdint>

namespace mtl::cuda {

// Columns of one parameter that a block takes at a time. 16 bytes, which a thread loads at once.
struct alignas(16) Tile {
  std::int64_t begin;
  std::int32_t columns;
  std::int32_t param;
};

// Every `stride`-th tile from `first_tile` on and before `end_tile`, all of one group and one dtype: what one
// block sums up on its own. Slices that take turns read neighbouring memory at the same time.
struct Slice {
  std::int64_t first_tile;
  std::int64_t end_tile;
  std::int64_t stride;
  std::int64_t columns;  // of all the slices that take turns
  std::int64_t group;
  // Its pod: neighbouring slices of a group, whose last one to finish adds up all of them, in the order of
  // their numbers. Told here rather than in a table of pods, which would be one access more to wait for.
  std::int64_t pod;
  std::int64_t first_of_pod;
  std::int64_t pod_slices;
};

// The pods of a group, likewise.
struct GroupPods {
  std::int64_t first_pod;
  std::int64_t num_pods;
};

}  // namespace mtl::cuda
