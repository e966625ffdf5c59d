// make_plan: every column in one tile, every tile in one slice, every slice in one pod, every pod in one
// group.
#include <algorithm>
#include <map>
#include <set>

#include "cuda_test.h"
#include "plan.h"

namespace test {
namespace {

using namespace mtl::cuda;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check(const std::vector<Item>& items, std::int64_t num_groups, const std::vector<Shape>& shapes) {
  const Plan plan = make_plan(items, num_groups, shapes);
  std::map<std::int64_t, const Item*> left;  // by parameter
  for (const Item& item : items)
    if (item.columns > 0) left[item.param] = &item;

  std::set<int> kinds;
  std::int64_t next_slice = 0;
  std::size_t next_span = 0;
  for (const Part& part : plan.parts) {
    const Shape& shape = shapes[part.kind];
    expect(kinds.insert(part.kind).second && part.first_slice == next_slice && part.num_slices > 0,
           "one part a kind, side by side");
    next_slice += part.num_slices;
    expect(part.tile_columns % shape.step_columns == 0 && part.tile_columns >= shape.step_columns &&
               part.tile_columns <= shape.step_columns * shape.max_steps,
           "tiles are whole steps");
    std::set<std::int64_t> lists;
    std::int64_t strides = 0, tiles = 0;
    for (std::int64_t n = part.first_slice; n < next_slice;) {
      const Slice list = plan.slices[n];
      expect(lists.insert(list.group).second, "one list of tiles for each group");
      expect(list.stride >= 1 && list.stride <= std::max<std::int64_t>(list.num_tiles, 1),
             "no slice without a tile");
      for (std::int64_t first = 0; first < list.stride; ++first, ++n) {
        const Slice& slice = plan.slices[n];
        expect(slice.first_tile == first && slice.stride == list.stride &&
                   slice.num_tiles == list.num_tiles && slice.first_span == list.first_span &&
                   slice.num_spans == list.num_spans && slice.group == list.group,
               "slices of a list take turns");
      }
      expect(list.first_span == static_cast<std::int64_t>(next_span), "lists of spans side by side");
      std::int64_t tile = 0;
      for (std::int64_t s = 0; s < list.num_spans; ++s, ++next_span) {
        const Span& span = plan.spans[next_span];
        const auto item = left.find(span.param);
        expect(item != left.end() && item->second->kind == part.kind && item->second->group == list.group &&
                   item->second->columns == span.columns,
               "every parameter once, with its kind and group");
        left.erase(item);
        expect(span.first_tile == tile, "tiles are numbered on");
        tile += ceil_div(span.columns, part.tile_columns);
      }
      expect(tile == list.num_tiles, "the number of tiles");
      strides += list.stride;
      tiles += tile;
    }
    const auto num_lists = static_cast<std::int64_t>(lists.size());
    expect(strides <= shape.blocks + num_lists, "about one wave of slices");
    expect(strides >= std::min(shape.blocks, tiles) - num_lists, "enough slices for every block");
  }
  expect(left.empty() && next_span == plan.spans.size(), "every column");
  expect(next_slice == static_cast<std::int64_t>(plan.slices.size()), "every slice");

  expect(static_cast<std::int64_t>(plan.groups.size()) == num_groups, "every group");
  std::int64_t next_pod = 0;
  std::set<std::int64_t> slices;
  for (std::int64_t group = 0; group < num_groups; ++group) {
    expect(plan.groups[group].first_pod == next_pod && plan.groups[group].num_pods > 0, "pods side by side");
    std::int64_t before = -1;
    for (std::int64_t n = 0; n < plan.groups[group].num_pods; ++n, ++next_pod) {
      const Pod& pod = plan.pods[next_pod];
      expect(pod.num_slices >= 1 && pod.num_slices <= 16, "small pods");
      for (std::int64_t slice = pod.first_slice; slice < pod.first_slice + pod.num_slices; ++slice) {
        expect(slices.insert(slice).second && slice > before, "every slice in one pod, in order");
        expect(plan.slices[slice].pod == next_pod && plan.slices[slice].group == group,
               "a slice knows its pod");
        before = slice;
      }
    }
  }
  expect(next_pod == static_cast<std::int64_t>(plan.pods.size()) && slices.size() == plan.slices.size(),
         "every pod and slice");
}

}  // namespace

void test_plan() {
  check({}, 1, {{32, 8, 4}});
  check({}, 3, {{32, 8, 4}, {1, 1, 1}});
  check({{7, 0, 1, 1}}, 2, {{32, 8, 4}, {16, 4, 6}});
  check({{0, std::int64_t{1} << 41, 0, 0}, {1, 5, 0, 0}}, 1, {{2048, 2, 1000}});
  for (int round = 0; round < 300; ++round) {
    context() = "plan, round " + std::to_string(round);
    std::vector<Shape> shapes;
    for (int kind = 0; kind < 4; ++kind) shapes.push_back({1 << draw(8), 1 + draw(8), 1 + draw(60)});
    const int groups = 1 + draw(5), largest = 1 << draw(18);
    std::vector<Item> items;
    const int count = draw(12);
    for (int p = 0; p < count; ++p) items.push_back({p, draw(largest), draw(groups), draw(1 + draw(4))});
    check(items, groups, shapes);
  }
}

}  // namespace test
