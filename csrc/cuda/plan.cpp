#include "plan.h"

#include <algorithm>
#include <tuple>

namespace mtl::cuda {
namespace {

// Slices of a pod: all of a group that has few, so that one block's wait for L2 is all there is.
constexpr std::int64_t kFewSlices = 32, kPodSlices = 16;

// Tiles of a block of which one is little.
constexpr std::int64_t kManyTiles = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The columns of a tile: as many rounds as the longest tiles take, in tiles that are equally long in each of
// them. So every block has a tile where there are columns for all, and the last round is no short one. Long
// tiles begin less often, with a wait for addresses and then for data; but blocks may differ by one tile in
// what they have to do, which should be little.
std::int64_t tile_columns(const Shape& shape, std::int64_t columns) {
  const std::int64_t wave = shape.blocks * shape.step_columns;
  const std::int64_t longest =
      std::max(shape.max_steps, std::min(shape.long_steps, columns / (wave * kManyTiles)));
  const std::int64_t rounds = std::max<std::int64_t>(ceil_div(columns, wave * longest), 1);
  return shape.step_columns * std::clamp<std::int64_t>(ceil_div(columns, wave * rounds), 1, longest);
}

void append_tiles(const Item& item, std::int64_t width, std::vector<Tile>* tiles) {
  for (std::int64_t begin = 0; begin < item.columns; begin += width) {
    const auto columns = static_cast<std::int32_t>(std::min(width, item.columns - begin));
    tiles->push_back({begin, columns, static_cast<std::int32_t>(item.param)});
  }
}

// Whole tiles first, then from long to short: when the slices take turns, what is uneven comes last and is
// small.
void order_tiles(std::vector<Tile>::iterator first, std::vector<Tile>::iterator last, std::int64_t width) {
  const auto partial = std::stable_partition(first, last, [&](const Tile& t) { return t.columns == width; });
  std::stable_sort(partial, last, [](const Tile& a, const Tile& b) { return a.columns > b.columns; });
}

}  // namespace

Plan make_plan(std::vector<Item> items, std::int64_t num_groups, const std::vector<Shape>& shapes) {
  Plan plan;
  std::vector<std::int64_t> columns(shapes.size()), widths(shapes.size()), tiles(shapes.size());
  std::vector<bool> has_items(static_cast<std::size_t>(num_groups));
  for (const Item& item : items) {
    columns[item.kind] += item.columns;
    has_items[item.group] = true;
  }
  const int any_kind = items.empty() ? 0 : items.front().kind;
  for (std::int64_t group = 0; group < num_groups; ++group)
    if (!has_items[group]) items.push_back({0, 0, group, any_kind});
  for (std::size_t kind = 0; kind < shapes.size(); ++kind)
    widths[kind] = tile_columns(shapes[kind], columns[kind]);
  for (const Item& item : items) tiles[item.kind] += ceil_div(item.columns, widths[item.kind]);

  // Slices of a kind stand together, those of a group in the order of its numbers.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::tie(a.kind, a.group) < std::tie(b.kind, b.group);
  });
  std::vector<std::vector<std::int64_t>> slices_of(static_cast<std::size_t>(num_groups));
  for (std::size_t i = 0; i < items.size();) {
    const int kind = items[i].kind;
    const auto first = static_cast<std::int64_t>(plan.tiles.size());
    Slice slice{};
    slice.group = items[i].group;
    for (; i < items.size() && items[i].kind == kind && items[i].group == slice.group; ++i) {
      append_tiles(items[i], widths[kind], &plan.tiles);
      slice.columns += items[i].columns;
    }
    order_tiles(plan.tiles.begin() + first, plan.tiles.end(), widths[kind]);
    slice.end_tile = static_cast<std::int64_t>(plan.tiles.size());
    const std::int64_t own_tiles = slice.end_tile - first;
    const std::int64_t share = tiles[kind] == 0 ? 0 : shapes[kind].blocks * own_tiles / tiles[kind];
    slice.stride = std::clamp<std::int64_t>(share, 1, std::max<std::int64_t>(own_tiles, 1));
    if (plan.parts.empty() || plan.parts.back().kind != kind)
      plan.parts.push_back({kind, static_cast<std::int64_t>(plan.slices.size()), 0});
    plan.parts.back().num_slices += slice.stride;
    for (slice.first_tile = first; slice.first_tile < first + slice.stride; ++slice.first_tile) {
      slices_of[slice.group].push_back(static_cast<std::int64_t>(plan.slices.size()));
      plan.slices.push_back(slice);
    }
  }

  // Pods of neighbouring slices: where those of a group lie apart, in several kinds, so do its pods.
  for (const std::vector<std::int64_t>& slices : slices_of) {
    const auto count = static_cast<std::int64_t>(slices.size());
    const std::int64_t most = count <= kFewSlices ? kFewSlices : kPodSlices;
    const std::int64_t first_pod = plan.num_pods;
    for (std::int64_t begin = 0, end = 0; begin < count; begin = end, ++plan.num_pods) {
      while (end < count && end - begin < most && slices[end] == slices[begin] + end - begin) ++end;
      for (std::int64_t n = begin; n < end; ++n) {
        Slice& slice = plan.slices[slices[n]];
        slice.pod = plan.num_pods;
        slice.first_of_pod = slices[begin];
        slice.pod_slices = end - begin;
      }
    }
    plan.groups.push_back({first_pod, plan.num_pods - first_pod});
  }
  return plan;
}

}  // namespace mtl::cuda
