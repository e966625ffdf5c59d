#pragma once

// The host's plan of a launch: how columns become tiles, tiles slices, and slices the work of blocks. It
// depends on sizes, never on addresses, and runs without a GPU.

#include <cstdint>
#include <vector>

#include "tables.h"

namespace mtl::cuda {

// A parameter as the plan sees it. Parameters of different kinds (dtypes) go to different launches.
struct Item {
  std::int64_t param;
  std::int64_t columns;
  std::int64_t group;
  int kind;
};

// What a kind's kernel does at a time.
struct Shape {
  std::int64_t step_columns;    // a block, per step
  std::int64_t max_steps;       // per tile
  std::int64_t blocks;          // that run at the same time
  std::int64_t long_steps = 0;  // per tile, if that is more, where every block has many tiles even so
};

// The slices [first, first + count) of a kind.
struct Part {
  int kind;
  std::int64_t first_slice;
  std::int64_t num_slices;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Slice> slices;
  std::int64_t num_pods = 0;
  std::vector<GroupPods> groups;
  std::vector<Part> parts;  // one launch each
};

// `shapes` is indexed by kind. Every group below `num_groups` gets at least one slice, if an empty one, so
// that every one has a last slice to finish.
Plan make_plan(std::vector<Item> items, std::int64_t num_groups, const std::vector<Shape>& shapes);

}  // namespace mtl::cuda
