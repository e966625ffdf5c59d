#include "plan.h"

#include <algorithm>
#include <tuple>

namespace mtl::cuda {
namespace {

constexpr std::int64_t kPodSlices = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// As many steps a tile as leave every block a tile, so that small problems still use every block.
std::int64_t tile_columns(const Shape& shape, std::int64_t columns) {
  const std::int64_t steps = columns / (shape.blocks * shape.step_columns);
  return shape.step_columns * std::clamp<std::int64_t>(steps, 1, shape.max_steps);
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
    const std::int64_t group = items[i].group;
    Slice slice{};
    slice.first_span = static_cast<std::int64_t>(plan.spans.size());
    slice.group = group;
    for (; i < items.size() && items[i].kind == kind && items[i].group == group; ++i) {
      if (items[i].columns == 0) continue;
      plan.spans.push_back({items[i].param, slice.num_tiles, items[i].columns});
      slice.num_tiles += ceil_div(items[i].columns, widths[kind]);
      slice.columns += items[i].columns;
    }
    slice.num_spans = static_cast<std::int64_t>(plan.spans.size()) - slice.first_span;
    const std::int64_t share = tiles[kind] == 0 ? 0 : shapes[kind].blocks * slice.num_tiles / tiles[kind];
    slice.stride = std::clamp<std::int64_t>(share, 1, std::max<std::int64_t>(slice.num_tiles, 1));
    if (plan.parts.empty() || plan.parts.back().kind != kind)
      plan.parts.push_back({kind, static_cast<std::int64_t>(plan.slices.size()), 0, widths[kind]});
    plan.parts.back().num_slices += slice.stride;
    for (slice.first_tile = 0; slice.first_tile < slice.stride; ++slice.first_tile) {
      slices_of[group].push_back(static_cast<std::int64_t>(plan.slices.size()));
      plan.slices.push_back(slice);
    }
  }

  // A group's slices of one kind are neighbours; a pod holds slices of one kind.
  for (const std::vector<std::int64_t>& slices : slices_of) {
    plan.groups.push_back({static_cast<std::int64_t>(plan.pods.size()), 0});
    for (std::size_t n = 0; n < slices.size(); ++n) {
      const bool follows = n > 0 && slices[n] == slices[n - 1] + 1;
      if (!follows || plan.pods.back().num_slices == kPodSlices) {
        plan.pods.push_back({slices[n], 0});
        plan.groups.back().num_pods += 1;
      }
      plan.pods.back().num_slices += 1;
      plan.slices[slices[n]].pod = static_cast<std::int64_t>(plan.pods.size()) - 1;
    }
  }
  return plan;
}

}  // namespace mtl::cuda
