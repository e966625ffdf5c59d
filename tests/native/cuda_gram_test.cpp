// gram, its statistics, and the solver behind it.
#include <algorithm>

#include "cuda_test.h"
#include "gram.h"
#include "gram_kernels.h"

namespace test {
namespace {

using mtl::cuda::GramCall;
using mtl::cuda::GramPlan;
using mtl::cuda::SolverArguments;

struct Result {
  std::vector<double> gram, norms, cosines, weights, certificate;
  std::vector<std::int64_t> rng;
};

constexpr std::int64_t kSliceWords = sizeof(mtl::cuda::Slice) / sizeof(std::int64_t);

// Lets a plan take its groups for so long that 16-bit rows are summed in float, without that many columns.
void pretend_long(const Table& table, const GramPlan& plan, std::vector<std::int64_t>* words) {
  const std::int64_t pods = plan.num_counters() - table.num_groups - 1;
  const std::int64_t slices = plan.sum_doubles() / mtl::cuda::num_pairs(table.num_tasks) - pods;
  const std::int64_t after = 2 * table.num_groups;  // words
  std::int64_t* at = words->data() + words->size() - after - slices * kSliceWords;
  for (std::int64_t n = 0; n < slices; ++n, at += kSliceWords) {
    mtl::cuda::Slice slice;
    std::memcpy(&slice, at, sizeof slice);
    expect(slice.group >= 0 && slice.group < table.num_groups && slice.columns <= 1 << 20,
           "the place of the slices");
    slice.columns += mtl::cuda::kFloatColumns;
    std::memcpy(at, &slice, sizeof slice);
  }
}

bool slow_double() { return emulation::options().single_to_double_ratio > 4; }

mtl::cuda::GramKernel kernel_of(DType dtype, int K) {
  return mtl::cuda::gram_kernel(dtype, K, slow_double());
}

struct Behind {  // what gram is followed by
  bool statistics = false;
  const SolverCase* solver = nullptr;
  std::vector<unsigned char> active = {};  // [K] or [groups, K], or empty
  bool advance_rng = false;
};

bool same(const Result& a, const Result& b) {
  return same_bits(a.gram, b.gram) && same_bits(a.norms, b.norms) && same_bits(a.cosines, b.cosines) &&
         same_bits(a.weights, b.weights) && same_bits(a.certificate, b.certificate) &&
         same_bits(a.rng, b.rng);
}

Result run(const Table& table, const Behind& behind = {}, bool long_sums = false) {
  const auto K = static_cast<std::size_t>(table.num_tasks),
             groups = static_cast<std::size_t>(table.num_groups);
  const GramPlan plan(0, table.rows(), table.num_groups);
  std::vector<std::int64_t> words = plan.words();
  if (long_sums) pretend_long(table, plan, &words);
  std::vector<double> sums(static_cast<std::size_t>(plan.sum_doubles()), NAN);
  std::vector<unsigned> counters(static_cast<std::size_t>(plan.num_counters()));
  Result first;
  in_orders([&] {
    Result now;
    now.gram.assign(groups * K * K, NAN);
    if (behind.statistics) {
      now.norms.assign(groups * K, NAN);
      now.cosines.assign(groups * K * K, NAN);
    }
    SolverArguments arguments;
    std::vector<double> scratch;
    if (behind.solver != nullptr) {
      now.weights.assign(groups * K, NAN);
      now.certificate.assign(groups * 2, NAN);
      now.rng = {11, 5};
      arguments.name = behind.solver->name;
      arguments.num_tasks = table.num_tasks;
      arguments.active = behind.active.empty() ? nullptr : behind.active.data();
      arguments.active_stride = behind.active.size() > K ? table.num_tasks : 0;
      arguments.rng = now.rng.data();
      arguments.advance_rng = behind.advance_rng;
      arguments.options = behind.solver->options;
      arguments.weights = now.weights.data();
      arguments.certificate = now.certificate.data();
      scratch.assign(static_cast<std::size_t>(plan.scratch_doubles(arguments)), NAN);
    }
    GramCall{plan,
             table.pointers().data(),
             words.data(),
             sums.data(),
             counters.data(),
             now.gram.data(),
             behind.statistics ? now.norms.data() : nullptr,
             behind.statistics ? now.cosines.data() : nullptr,
             behind.solver != nullptr ? &arguments : nullptr,
             scratch.empty() ? nullptr : scratch.data()}
        .run(nullptr);
    for (const unsigned counter : counters) expect(counter == 0, "counters are zero again");
    if (first.gram.empty()) first = now;
    expect(same(first, now), "the same bits in every order");
  });
  return first;
}

void expect_gram(const Table& table, const std::vector<double>& gram, long double tolerance) {
  const Table::Grams grams = table.grams();
  const auto K = static_cast<std::size_t>(table.num_tasks);
  for (std::size_t n = 0; n < gram.size(); ++n) {
    const long double error = std::fabs(static_cast<long double>(gram[n]) - grams.exact[n]);
    if (error <= tolerance * grams.absolute[n]) continue;
    context() += ", group " + std::to_string(n / (K * K)) + ", pair " + std::to_string(n / K % K) + " " +
                 std::to_string(n % K) + ": " + std::to_string(gram[n]) + " instead of " +
                 std::to_string(static_cast<double>(grams.exact[n]));
    expect(false, "the Gram matrix");
  }
}

void expect_statistics(const Table& table, const Result& result) {
  const int K = table.num_tasks;
  for (int group = 0; group < table.num_groups; ++group) {
    const double *gram = &result.gram[group * K * K], *norms = &result.norms[group * K],
                 *cosines = &result.cosines[group * K * K];
    for (int i = 0; i < K; ++i) {
      expect(norms[i] == std::sqrt(gram[i * K + i]), "norms");
      expect(cosines[i * K + i] == (norms[i] > 0 ? 1.0 : 0.0), "cosines of a row with itself");
      for (int j = 0; j < i; ++j) {
        const double cosine = cosines[i * K + j];
        const double exact = norms[i] * norms[j] > 0 ? gram[i * K + j] / (norms[i] * norms[j]) : 0.0;
        expect(cosine == cosines[j * K + i] && std::fabs(cosine) <= 1.0, "cosines are symmetric, at most 1");
        expect(std::fabs(cosine - exact) <= 1e-15, "cosines");
      }
    }
  }
}

// Sizes on both sides of every border in a kernel: vectors, steps or stages, tiles.
std::vector<std::int64_t> border_sizes(DType dtype, int K) {
  const mtl::cuda::GramKernel kernel = kernel_of(dtype, K);
  const std::int64_t vector = 16 / mtl::item_size(dtype), step = kernel.step_columns,
                     tile = step * kernel.max_steps;
  if (kForRaces) return {0, vector + 1, step + vector - 1, tile, tile + 1};
  return {0,        1,        vector - 1, vector,          vector + 1, step - 1, step,
          step + 1, tile - 1, tile + 0,   tile + step + 1, step + 3,   2};
}

void name_case(const char* what, DType dtype, int K) {
  context() =
      std::string(what) + ", dtype " + std::to_string(static_cast<int>(dtype)) + ", K = " + std::to_string(K);
}

// One block, and so the longest tiles; several spans in each of two groups, and empty groups around them.
void test_borders(DType dtype, int K) {
  name_case("borders", dtype, K);
  set_device(1, 1);
  std::vector<Param> params;
  const int size = static_cast<int>(mtl::item_size(dtype));
  const std::vector<std::int64_t> sizes = border_sizes(dtype, K);
  for (std::size_t n = 0; n < sizes.size(); ++n) params.push_back({dtype, sizes[n], n % 3 == 1 ? 1 : 3});
  for (const int offset : {2, 4, 8}) {
    if (offset < size) continue;
    for (const std::int64_t length : {sizes.back(), sizes[sizes.size() / 2], sizes[sizes.size() - 2] + 5})
      params.push_back({dtype, length, 3, offset});
  }
  const Table table(K, 5, params, most_reach);
  const Result result = run(table, {true}, true);
  expect_gram(table, result.gram, 0);
  expect_statistics(table, result);
}

// Many blocks: short tiles, slices of every block, one pod or several.
void test_many_blocks(DType dtype, int K) {
  name_case("many blocks", dtype, K);
  const std::int64_t step = kernel_of(dtype, K).step_columns;
  const Table table(K, 2, {{dtype, 33 * step + 1, 0}, {dtype, 3, 1}, {dtype, 17 * step - 1, 0}});
  for (const bool several : {false, true}) {
    set_device(several ? 40 : 15, 2);
    const std::int64_t pods = GramPlan(0, table.rows(), 2).num_counters() - 3;
    expect(several ? pods > 2 : pods == 2, "a pod for each of two groups, or more");
    expect_gram(table, run(table).gram, 0);
  }
}

// So many columns that tiles are longer than a run of sums in float.
void test_long_tiles(DType dtype, int K, int offset) {
  name_case("long tiles", dtype, K);
  set_device(1, 1);
  const mtl::cuda::GramKernel kernel = kernel_of(dtype, K);
  const std::int64_t steps = (mtl::item_size(dtype) == 2 ? 2 : 1) * kernel.max_steps + 1;
  const std::int64_t width = steps * kernel.step_columns;
  const Table table(K, 1, {{dtype, 16 * width + kernel.step_columns + 3, 0, offset}});
  mtl::cuda::Tile first;
  std::memcpy(&first, GramPlan(0, table.rows(), 1).words().data(), sizeof first);
  expect(first.columns > kernel.max_steps * kernel.step_columns, "tiles are long");
  expect_gram(table, run(table, {}, true).gram, 0);
}

// Cosines of rows that are equal, or opposite, to which rounding would give more than 1.
void test_equal_rows(int K) {
  name_case("equal rows", DType::kFloat64, K);
  const double value = draw_normal();
  const Table table(K, 1, {{DType::kFloat64, 3}}, all_reach,
                    [&](int k, std::size_t, std::int64_t) { return k % 2 == 0 ? value : -value; });
  expect_statistics(table, run(table, {true}));
}

// No columns at all, with and without parameters.
void test_nothing(int K) {
  name_case("nothing", DType::kFloat32, K);
  for (const Table& table : {Table(K, 1, {}), Table(K, 3, {}), Table(K, 2, {{DType::kBFloat16, 0, 1}}),
                             Table(K, 1, {{DType::kFloat64, 9}}, [](int, std::size_t) { return false; })}) {
    const Result result = run(table, {true});
    for (const double x : result.gram) expect(x == 0 && !std::signbit(x), "zeros");
    expect_statistics(table, result);
  }
}

constexpr int kTiles = 3;

// Two whole tiles and most of a third, of which `value` learns the number.
Table tiled(DType dtype, int K, int offset,
            const std::function<double(int k, int tile, std::int64_t n)>& value) {
  const mtl::cuda::GramKernel kernel = kernel_of(dtype, K);
  const std::int64_t tile = kernel.step_columns * kernel.max_steps;
  return {K,
          1,
          {{dtype, kTiles * tile - kernel.step_columns + 11, 0, offset}},
          all_reach,
          [&](int k, std::size_t, std::int64_t n) { return value(k, static_cast<int>(n / tile), n); }};
}

void test_scale(DType dtype, int K, int offset, double scale_of_last, double scale, double tolerance) {
  const Table table = tiled(dtype, K, offset, [&](int k, int, std::int64_t) {
    return draw_normal() * (k == K - 1 ? scale_of_last : scale);
  });
  expect_gram(table, run(table, {}, true).gram, tolerance);
}

// The last row is far from the others in one tile.
void test_odd_tile(DType dtype, int K, int offset, int tile, double scale) {
  const Table table = tiled(dtype, K, offset, [&](int k, int at, std::int64_t) {
    return draw_exact() * (at == tile && k == K - 1 ? scale : 1.0);
  });
  expect_gram(table, run(table, {}, true).gram, 1e-15L);
}

// The same with tiles of two runs each: `number` is that of a run.
void test_odd_run(DType dtype, int K, int number, double scale) {
  const mtl::cuda::GramKernel kernel = kernel_of(dtype, K);
  const std::int64_t run_columns = kernel.step_columns * kernel.max_steps;
  const Table table(K, 1, {{dtype, 32 * run_columns + 7}}, all_reach,
                    [&](int k, std::size_t, std::int64_t n) {
                      return draw_exact() * (n / run_columns == number && k == K - 1 ? scale : 1.0);
                    });
  expect_gram(table, run(table, {}, true).gram, 1e-15L);
}

// Ones beside a square of 2^28, which a sum in float that holds both would lose: it holds none from further
// away than a run is long.
void test_run_length(DType dtype, int K) {
  const mtl::cuda::GramKernel kernel = kernel_of(dtype, K);
  const std::int64_t run_columns = kernel.step_columns * kernel.max_steps;
  const Table table(K, 1, {{dtype, 32 * run_columns}}, all_reach, [&](int, std::size_t, std::int64_t n) {
    return n % (2 * run_columns) == 0 ? 0x1p14 : n % (2 * run_columns) < run_columns ? 0.0 : 1.0;
  });
  expect_gram(table, run(table, {}, true).gram, 0);
}

// One element of the last row is not zero, and too small to be squared in float.
void test_lone_element(DType dtype, int K, int offset, std::int64_t column) {
  const Table table = tiled(dtype, K, offset, [&](int k, int, std::int64_t n) {
    return k < K - 1 ? draw_exact() : n == column ? 0x1p-80 : 0.0;
  });
  expect_gram(table, run(table, {}, true).gram, 1e-15L);
}

// Rows that differ by a thousandth keep the length of their difference.
void test_near_parallel(DType dtype, int K) {
  std::vector<double> first;
  const Table table(K, 1, {{dtype, mtl::cuda::kFloatColumns}}, all_reach,
                    [&](int k, std::size_t, std::int64_t n) {
                      if (k == 0) first.push_back(draw_normal());
                      return first[static_cast<std::size_t>(n)] + (k == 0 ? 0.0 : 1e-3 * draw_normal());
                    });
  const std::vector<double> gram = run(table).gram;
  const Table::Grams grams = table.grams();
  for (int i = 1; i < K; ++i) {
    const double difference = gram[0] + gram[i * K + i] - 2 * gram[i];
    const auto exact = static_cast<double>(grams.exact[0] + grams.exact[i * K + i] - 2 * grams.exact[i]);
    expect(std::fabs(difference - exact) < 0.05 * exact, "the difference of rows that are nearly parallel");
  }
}

// An element of the last row is not finite, of columns that the first row has no part in.
void test_not_finite(DType dtype, int K, double value) {
  const std::int64_t step = kernel_of(dtype, K).step_columns;
  const Table table(
      K, 1, {{dtype, 20}, {dtype, step + 9}, {dtype, 5}},
      [](int k, std::size_t p) { return k > 0 || p != 1; },
      [&](int k, std::size_t p, std::int64_t n) {
        return k == K - 1 && p == 1 && n == 17 ? value : draw_exact() + 5;
      });
  const std::vector<double> gram = run(table, {}, true).gram;
  const Table::Grams grams = table.grams();
  for (int i = 0; i < K; ++i) {
    for (int j = 0; j < K; ++j) {
      const bool touched = (i == K - 1 && j > 0) || (j == K - 1 && i > 0);
      const double found = gram[i * K + j];
      expect(touched ? !std::isfinite(found) : found == static_cast<double>(grams.exact[i * K + j]),
             "inf and nan where both rows exist");
    }
  }
}

}  // namespace

void test_gram(DType dtype) {
  // Kernels differ by K; those of the two 16-bit dtypes do not differ from each other but for the conversion.
  const bool every = dtype == DType::kFloat32 || dtype == DType::kBFloat16;
  const std::vector<int> sizes =
      kForRaces ? std::vector<int>{3, 8, 9, 33, 65}
      : every   ? std::vector<int>{1, 2, 3, 5, 6, 7, 8, 9, 16, 17, 31, 33, 40, 48, 49, 64, 65, 96, 97, 128}
                : std::vector<int>{2, 5, 7, 9, 16, 31, 33, 48, 64, 65, 97};
  for (const int K : sizes) test_borders(dtype, K);
  for (const int K : kForRaces ? std::vector<int>{4, 9} : std::vector<int>{1, 4, 9, 33})
    test_many_blocks(dtype, K);
  for (const int K : every && !kForRaces ? std::vector<int>{2, 4, 8, 9, 33, 64} : std::vector<int>{9})
    test_long_tiles(dtype, K, 0);
  if (every && !kForRaces) {
    for (const int K : {2, 9}) test_long_tiles(dtype, K, 8);
  }
  for (const int K : {1, 8, 9}) test_nothing(K);
  for (int round = 0; round < (kForRaces ? 1 : 10); ++round) test_equal_rows(8);
}

void test_gram_mixed() {
  for (const int K : {1, 2, 3, 5, 8, 9, 17, 40, 64, 65, 128}) {
    if (kForRaces && K > 40) continue;
    name_case("mixed", DType::kFloat32, K);
    set_device(1 + draw(4), 1 + draw(2));
    std::vector<Param> params;
    const int groups = 1 + draw(4), longest = (kForRaces ? 1000 : 4000) / K + 100;
    for (int p = 0; p < 9; ++p) {
      const DType dtype = kDTypes[draw(4)];
      const int offset = draw(3) == 0 ? static_cast<int>(mtl::item_size(dtype)) * (1 + draw(3)) : 0;
      params.push_back({dtype, draw(2) == 0 ? draw(20) : draw(longest), draw(groups), offset});
    }
    const bool whole = draw(2) == 0;
    const Table table(K, groups, params,
                      [&](int k, std::size_t) { return whole || (k != 1 && draw(4) > 0); });
    const Result result = run(table, {true});
    expect_gram(table, result.gram, 0);
    expect_statistics(table, result);
  }
}

void test_gram_range(DType dtype) {
  set_device(1, 1);
  // Of sums of at most 128 products in float, cut off where they are on the tensor cores; of sums in double.
  const double in_float = 0x1p-17, in_double = 1e-13;
  const auto sums_in_float = [&](int K) {
    return mtl::item_size(dtype) == 2 ||
           (dtype == DType::kFloat32 && slow_double() && K <= mtl::cuda::kTriangleTasks);
  };
  const std::vector<int> sizes = slow_double() ? std::vector<int>{2, 4, 6, 8}
                                 : kForRaces   ? std::vector<int>{8, 9}
                                               : std::vector<int>{2, 8, 9, 32, 33, 64, 65};
  for (const int K : sizes) {
    const bool in_runs = sums_in_float(K);
    for (const int offset : {0, 8}) {
      if (offset > 0 && K > 9) continue;
      name_case("range", dtype, K);
      test_scale(dtype, K, offset, 1, 1, in_runs ? in_float : in_double);
      if (dtype == DType::kFloat16) {
        test_scale(dtype, K, offset, 1e-7, 1, in_float);
        test_scale(dtype, K, offset, 1e4, 1e-6, in_float);
        continue;
      }
      const double small = dtype == DType::kFloat64 ? 1e-140 : 1e-25, large = 1 / small;
      test_scale(dtype, K, offset, small, small, in_double);
      test_scale(dtype, K, offset, large, large, in_double);
      test_scale(dtype, K, offset, small, 1, in_double);
      test_scale(dtype, K, offset, large, small, in_double);
      if (dtype == DType::kBFloat16) test_scale(dtype, K, offset, 1e-39, 1, in_double);  // subnormal
      if (!in_runs) continue;
      for (int tile = 0; tile < kTiles; ++tile) {
        name_case(tile == 0 ? "small in tile 0" : "small in a later tile", dtype, K);
        test_odd_tile(dtype, K, offset, tile, 0x1p-90);
        name_case(tile == 0 ? "large in tile 0" : "large in a later tile", dtype, K);
        test_odd_tile(dtype, K, offset, tile, 0x1p70);
      }
    }
    if (in_runs && dtype != DType::kFloat16 && !kForRaces && (K == 8 || K == 9)) {
      for (const int number : {0, 5, 30}) {
        name_case(("small or large in run " + std::to_string(number)).c_str(), dtype, K);
        test_odd_run(dtype, K, number, 0x1p-90);
        test_odd_run(dtype, K, number, 0x1p70);
      }
    }
    if (in_runs && !kForRaces && K <= 33) {
      name_case("the length of a run", dtype, K);
      test_run_length(dtype, K);
    }
    if (dtype == DType::kBFloat16 || slow_double()) {
      name_case("a lone element", dtype, K);
      for (std::int64_t column = 0; column < 16; ++column) test_lone_element(dtype, K, 0, 32 + column);
      test_lone_element(dtype, K, 8, 5);
    }
    if (dtype == DType::kFloat32 && !kForRaces && K <= 8) {
      name_case("near-parallel", dtype, K);
      test_near_parallel(dtype, K);
    }
    name_case("not finite", dtype, K);
    for (const double value :
         {static_cast<double>(INFINITY), static_cast<double>(-INFINITY), static_cast<double>(NAN)})
      test_not_finite(dtype, K, value);
  }
  if (!sums_in_float(2) || kForRaces) return;
  // Sums in float only where a group has many columns.
  for (const std::int64_t columns : {mtl::cuda::kFloatColumns - 1, mtl::cuda::kFloatColumns}) {
    for (const int K : {2, 9}) {
      if (!sums_in_float(K)) continue;
      name_case("many columns", dtype, K);
      const Table table(K, 1, {{dtype, columns - 9}, {dtype, 9}}, all_reach,
                        [](int, std::size_t, std::int64_t) { return draw_normal(); });
      const std::vector<double> gram = run(table).gram;
      expect_gram(table, gram, in_float);
      const Table::Grams grams = table.grams();
      const bool exact = std::fabs(gram[0] - static_cast<double>(grams.exact[0])) < in_double * gram[0];
      expect(exact == (columns < mtl::cuda::kFloatColumns), "double up to a number of columns");
    }
  }
}

// A block takes groups one after the other: the next one's rows do not come before the solver is done.
void test_solver_of_many_groups(const SolverCase& solver, int K) {
  context() = std::string("many groups, ") + solver.name + ", K = " + std::to_string(K);
  set_device(1, 1);
  std::vector<Param> params;
  for (int group = 0; group < 5; ++group) params.push_back({DType::kFloat32, 2 * K + 40 * group + 1, group});
  const Table table(K, 5, params, all_reach, [](int, std::size_t, std::int64_t) { return draw_normal(); });
  Behind behind;
  behind.solver = &solver;
  const Result result = run(table, behind);
  const std::int64_t rng[] = {11, 5};
  for (int group = 0; group < 5; ++group) {
    const double* gram = &result.gram[group * K * K];
    const Solution host = solve_on_host(solver, K, gram, nullptr, rng, group);
    expect_same_solution(solver, K, gram, &result.weights[group * K], &result.certificate[group * 2], nullptr,
                         host);
  }
}

void test_gram_solver() {
  for (const int K : kForRaces ? std::vector<int>{12} : std::vector<int>{5, 12, 20, 40})
    for (const SolverCase& solver : {SolverCase{"pcgrad", {1, 0}}, SolverCase{"min_norm", {0, 0, 0}}})
      test_solver_of_many_groups(solver, K);
  const SolverCase solvers[] = {{"pcgrad", {1, 0}}, {"pcgrad", {0, 1}}, {"min_norm", {0, 0, 1e-12}}};
  const std::vector<int> sizes =
      kForRaces ? std::vector<int>{2, 9, 33} : std::vector<int>{1, 2, 8, 9, 33, 49, 65, 97, 128};
  int number = 0, large = 0;
  for (const int K : sizes) {
    for (const SolverCase& solver : solvers) {
      if (K > 64 && large++ % 2 == 0) continue;
      context() = std::string("solver ") + solver.name + ", K = " + std::to_string(K);
      set_device(2, 2);
      // Group 1 is empty, group 2 of two dtypes, whose kernels have different amounts of shared memory.
      const std::vector<Param> params = {{DType::kFloat32, 2 * K + 7, 0},
                                         {DType::kBFloat16, 300, 2},
                                         {DType::kFloat32, K + 100, 2},
                                         {DType::kFloat16, 150, 3}};
      const Table table(K, 4, params, all_reach,
                        [&](int k, std::size_t, std::int64_t) { return draw_normal() * (1 + k % 3); });
      Behind behind;
      behind.solver = &solver;
      behind.statistics = number % 2 == 0;
      behind.advance_rng = number % 3 != 0;
      if (number % 3 != 1) behind.active.resize(static_cast<std::size_t>(number % 3 == 2 ? K : 4 * K), 1);
      for (std::size_t n = 0; n < behind.active.size(); ++n) behind.active[n] = n % 7 != 3;
      ++number;
      const Result result = run(table, behind);
      expect_gram(table, result.gram, 0x1p-17);
      expect(result.rng[0] == 11 && result.rng[1] == (behind.advance_rng ? 6 : 5), "the random state");
      const std::int64_t rng[] = {11, 5};
      for (int group = 0; group < 4; ++group) {
        const double* gram = &result.gram[group * K * K];
        const unsigned char* active = behind.active.empty() ? nullptr : behind.active.data();
        if (static_cast<int>(behind.active.size()) > K) active += group * K;
        const Solution host = solve_on_host(solver, K, gram, active, rng, group);
        expect_same_solution(solver, K, gram, &result.weights[group * K], &result.certificate[group * 2],
                             nullptr, host);
      }
    }
  }
}

}  // namespace test
