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

// The tiles of one kind and group: all columns of its parameters once, the whole tiles first.
void check_tiles(const Plan& plan, const Slice& list, std::int64_t begin, const Shape& shape,
                 std::int64_t kind_columns, std::map<std::int64_t, const Item*>* left, int kind) {
  std::map<std::int64_t, std::int64_t> next;  // column, by parameter
  std::vector<Tile> tiles(plan.tiles.begin() + begin, plan.tiles.begin() + list.end_tile);
  std::int32_t width = 0, before = INT32_MAX;
  for (const Tile& tile : tiles) {
    expect(tile.columns > 0 && tile.columns <= before, "from long to short");
    width = std::max(width, tile.columns);
    before = tile.columns;
  }
  if (width > shape.step_columns * shape.max_steps) {
    expect(width <= shape.step_columns * shape.long_steps, "tiles are not too long");
    expect(16 * shape.blocks * width <= kind_columns, "long tiles where there are many");
  }
  std::sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.begin < b.begin; });
  for (const Tile& tile : tiles) {
    expect(tile.begin == next[tile.param] && tile.begin % shape.step_columns == 0, "tiles side by side");
    next[tile.param] += tile.columns;
  }
  std::int64_t columns = 0;
  for (const auto& [param, end] : next) {
    const auto item = left->find(param);
    expect(item != left->end() && item->second->kind == kind && item->second->group == list.group &&
               item->second->columns == end,
           "every parameter once, with its kind and group");
    left->erase(item);
    columns += end;
  }
  expect(columns == list.columns, "the number of columns");
}

void check(const std::vector<Item>& items, std::int64_t num_groups, const std::vector<Shape>& shapes) {
  const Plan plan = make_plan(items, num_groups, shapes);
  std::map<std::int64_t, const Item*> left;  // by parameter
  for (const Item& item : items)
    if (item.columns > 0) left[item.param] = &item;

  std::map<int, std::int64_t> columns;  // by kind
  for (const Item& item : items) columns[item.kind] += item.columns;
  std::set<int> kinds;
  std::int64_t next_slice = 0, next_tile = 0;
  for (const Part& part : plan.parts) {
    const Shape& shape = shapes[part.kind];
    expect(kinds.insert(part.kind).second && part.first_slice == next_slice && part.num_slices > 0,
           "one part a kind, side by side");
    next_slice += part.num_slices;
    std::set<std::int64_t> lists;
    std::int64_t strides = 0;
    const std::int64_t first_tile = next_tile;
    for (std::int64_t n = part.first_slice; n < next_slice;) {
      const Slice list = plan.slices[n];
      const std::int64_t begin = next_tile, count = list.end_tile - begin;
      expect(lists.insert(list.group).second && count >= 0, "one list of tiles for each group");
      expect(list.stride >= 1 && list.stride <= std::max<std::int64_t>(count, 1), "no slice without a tile");
      for (std::int64_t turn = 0; turn < list.stride; ++turn, ++n) {
        const Slice& slice = plan.slices[n];
        expect(slice.first_tile == begin + turn && slice.stride == list.stride &&
                   slice.end_tile == list.end_tile && slice.columns == list.columns &&
                   slice.group == list.group,
               "slices of a list take turns");
      }
      check_tiles(plan, list, begin, shape, columns[part.kind], &left, part.kind);
      next_tile = list.end_tile;
      strides += list.stride;
    }
    const auto num_lists = static_cast<std::int64_t>(lists.size());
    expect(strides <= shape.blocks + num_lists, "about one wave of slices");
    expect(strides >= std::min(shape.blocks, next_tile - first_tile) - num_lists,
           "enough slices for every block");
  }
  expect(left.empty() && next_tile == static_cast<std::int64_t>(plan.tiles.size()), "every column");
  expect(next_slice == static_cast<std::int64_t>(plan.slices.size()), "every slice");

  expect(static_cast<std::int64_t>(plan.groups.size()) == num_groups, "every group");
  std::int64_t next_pod = 0;
  std::size_t known_slices = 0;
  for (std::int64_t group = 0; group < num_groups; ++group) {
    const GroupPods& pods = plan.groups[group];
    expect(pods.first_pod == next_pod && pods.num_pods > 0, "pods side by side");
    std::vector<std::int64_t> slices;  // of the group
    for (std::size_t n = 0; n < plan.slices.size(); ++n)
      if (plan.slices[n].group == group) slices.push_back(static_cast<std::int64_t>(n));
    known_slices += slices.size();
    const std::int64_t most = slices.size() <= 32 ? 32 : 16;
    std::int64_t interruptions = 0;
    for (std::size_t n = 0; n < slices.size(); ++next_pod) {
      const std::int64_t first = slices[n];
      const Slice& pod = plan.slices[first];
      expect(pod.first_of_pod == first && pod.pod_slices >= 1 && pod.pod_slices <= most, "small pods");
      for (std::int64_t i = 0; i < pod.pod_slices; ++i, ++n) {
        expect(n < slices.size() && slices[n] == first + i, "neighbouring slices");
        const Slice& slice = plan.slices[slices[n]];
        expect(slice.pod == next_pod && slice.first_of_pod == first && slice.pod_slices == pod.pod_slices,
               "a slice knows its pod");
      }
      if (n < slices.size() && slices[n] != slices[n - 1] + 1)
        ++interruptions;
      else
        expect(n == slices.size() || pod.pod_slices == most, "no more pods than needed");
    }
    expect(next_pod == pods.first_pod + pods.num_pods, "every pod of the group");
    if (slices.size() <= 32) expect(pods.num_pods == 1 + interruptions, "few slices meet once");
  }
  expect(next_pod == plan.num_pods && known_slices == plan.slices.size(), "every pod and slice");
}

struct Work {          // in steps
  std::int64_t most;   // of a block
  std::int64_t total;  // of all
  std::int64_t width;  // of the longest tile
};

Work work_of(const Plan& plan, const Shape& shape) {
  const auto steps = [&](const Tile& tile) {
    return (tile.columns + shape.step_columns - 1) / shape.step_columns;
  };
  Work work{0, 0, steps(plan.tiles.front())};
  for (const Slice& slice : plan.slices) {
    std::int64_t own = 0;
    for (std::int64_t tile = slice.first_tile; tile < slice.end_tile; tile += slice.stride)
      own += steps(plan.tiles[tile]);
    work.most = std::max(work.most, own);
    work.total += own;
  }
  return work;
}

// Work that is no multiple of what all blocks take at a time is still dealt evenly.
void check_balance() {
  for (const Shape& shape : {Shape{512, 8, 396}, Shape{512, 8, 396, 32}}) {
    for (const double steps :
         {0.3, 1.0, 2.1, 4.93, 8.0, 8.1, 12.5, 16.1, 100.3, 128.2, 145.0, 300.7, 511.9, 1000.1}) {
      context() = "plan, " + std::to_string(steps) + " steps a block";
      const auto columns =
          static_cast<std::int64_t>(steps * static_cast<double>(shape.blocks * shape.step_columns));
      const Work work = work_of(make_plan({{0, columns, 0, 0}}, 1, {shape}), shape);
      const double rounds = std::ceil(steps / static_cast<double>(work.width));
      expect(static_cast<double>(work.most) <= std::ceil(steps) + rounds, "no round in vain");
      const bool long_tiles =
          steps >= 16.0 * static_cast<double>(shape.max_steps + 1) && shape.long_steps > 0;
      expect((work.width > shape.max_steps) == long_tiles, "long tiles where there are many");
    }
  }
  // Nor do many parameters, each with a rest, leave a block more to do than one tile of many.
  const Shape shape = {512, 8, 40, 32};
  for (int round = 0; round < 20; ++round) {
    context() = "plan, many parameters, round " + std::to_string(round);
    std::vector<Item> items;
    for (int p = 0; p < 200; ++p) items.push_back({p, 1 + draw(1 << draw(20)), 0, 0});
    const Work work = work_of(make_plan(items, 1, {shape}), shape);
    expect(work.most <= work.total / shape.blocks + work.width, "at most one tile above the mean");
    expect(work.width <= std::max(shape.max_steps, work.total / shape.blocks / 16), "which is little");
  }
}

}  // namespace

void test_plan() {
  check_balance();
  check({}, 1, {{32, 8, 4}});
  check({}, 3, {{32, 8, 4}, {1, 1, 1}});
  check({{7, 0, 1, 1}}, 2, {{32, 8, 4}, {16, 4, 6}});
  check({{0, std::int64_t{1} << 33, 0, 0}, {1, 5, 0, 0}}, 1, {{2048, 8, 1000, 32}});
  for (const std::int64_t slices : {31, 32, 33, 64}) check({{0, 100, 0, 0}}, 1, {{1, 1, slices}});
  for (int round = 0; round < 300; ++round) {
    context() = "plan, round " + std::to_string(round);
    std::vector<Shape> shapes;
    for (int kind = 0; kind < 4; ++kind)
      shapes.push_back({1 << draw(8), 1 + draw(8), 1 + draw(60), draw(30)});
    const int groups = 1 + draw(5), largest = 1 << draw(18);
    std::vector<Item> items;
    const int count = draw(12);
    for (int p = 0; p < count; ++p) items.push_back({p, draw(largest), draw(groups), draw(1 + draw(4))});
    check(items, groups, shapes);
  }
}

}  // namespace test
