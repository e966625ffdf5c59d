// The operations that need the rows element by element: every output, every state and every sum.
#include <algorithm>

#include "combine.h"
#include "combine_kernels.h"
#include "cuda_test.h"
#include "mtl_kernels/elementwise.h"
#include "state.h"

namespace test {
namespace {

using mtl::StateOperation;
using mtl::cuda::Combination;
using mtl::cuda::CombineCall;
using mtl::cuda::CombinePlan;
using mtl::cuda::StatePlan;
using mtl::cuda::StateUpdate;

std::vector<unsigned char> bytes_of(const Memory& memory) {
  return {memory.begin(), memory.begin() + memory.bytes()};
}

void restore(const std::vector<unsigned char>& bytes, Memory& memory) {
  std::copy(bytes.begin(), bytes.end(), memory.begin());
}

// Rounded once, give or take what the order of few sums in double may change at a tie.
void expect_near(DType dtype, double found, double exact, double sizes, const char* what) {
  const double slack = 0x1p-48 * sizes;
  if (found >= quantized(dtype, exact - slack) && found <= quantized(dtype, exact + slack)) return;
  if (std::isnan(found) && std::isnan(exact)) return;
  context() += ": " + std::to_string(found) + " instead of " + std::to_string(exact);
  expect(false, what);
}

struct Call {
  Combination combination;
  int trim;
  const std::vector<double>& leak;
  const std::int64_t* rng;
};

double result_of(const Call& call, std::vector<double> column, std::uint64_t element) {
  const auto K = static_cast<int>(column.size());
  double exact = 0, total = 0, size = 0;
  if (std::any_of(column.begin(), column.end(), [](double g) { return std::isnan(g); })) return NAN;
  if (call.combination == Combination::kTrimmedMean) {
    std::sort(column.begin(), column.end());
    for (int k = call.trim; k < K - call.trim; ++k) exact += column[k];
    return exact / (K - 2 * call.trim);
  }
  for (const double g : column) total += g, size += std::fabs(g);
  const double purity = size == 0 ? 0.5 : (1 + total / size) / 2;
  const mtl::Philox4 words = mtl::threshold_words(call.rng, element / 4);
  const double threshold = (words.word[element % 4] + 0.5) / 4294967296.0;
  for (int k = 0; k < K; ++k) {
    const bool kept = column[k] > 0 ? purity > threshold : purity < threshold;
    exact += kept                                              ? column[k]
             : call.combination == Combination::kLeakyGradDrop ? column[k] * call.leak[k]
                                                               : 0;
  }
  return exact;
}

// Parameters of one dtype, some of whose outputs are a row, some at odd places, and one that no task reaches.
void check_columns(DType dtype, int K, const std::vector<std::int64_t>& sizes) {
  const auto size_of = static_cast<int>(mtl::item_size(dtype));
  std::vector<Param> params;
  for (const std::int64_t size : sizes)
    params.push_back({dtype, size, 0, params.size() % 3 == 2 ? size_of * (1 + draw(16 / size_of - 1)) : 0});
  params.push_back({dtype, 40});
  const std::size_t P = params.size();
  const auto reaches = [&](int k, std::size_t p) {
    return p + 1 < P && (k == static_cast<int>(p) % K || most_reach(k, p));
  };
  const Table table(K, 1, params, reaches, [](int k, std::size_t p, std::int64_t i) {
    return k == 0 && p == 1 && i == 3 ? static_cast<double>(NAN) : draw_exact();
  });
  std::vector<std::int64_t> numels;
  std::vector<std::unique_ptr<Memory>> own(P);
  std::vector<Memory*> targets;
  std::vector<std::uintptr_t> addresses;
  std::vector<int> codes;
  for (std::size_t p = 0; p < P; ++p) {
    const bool in_place = p % 2 == 1;
    if (!in_place) own[p] = std::make_unique<Memory>(params[p].columns * size_of, p % 4 == 2 ? size_of : 0);
    targets.push_back(p + 1 == P ? nullptr
                      : in_place ? table.memory(static_cast<int>(p) % K, p)
                                 : own[p].get());
    addresses.push_back(targets[p] == nullptr ? 0 : targets[p]->address());
    codes.push_back(targets[p] == nullptr ? -1 : static_cast<int>(dtype));
  }
  std::vector<double> leak(K);
  for (double& share : leak) share = draw(9) / 8.0;
  const std::int64_t rng[2] = {draw(1 << 30), draw(1 << 30)};
  std::vector<Call> calls{{Combination::kGradDrop, 0, leak, rng},
                          {Combination::kLeakyGradDrop, 0, leak, rng}};
  for (const int trim : {0, 1, (K - 1) / 3, (K - 1) / 2})
    if (K >= 2 * trim + 1) calls.push_back({Combination::kTrimmedMean, trim, leak, rng});
  const std::string base = context();
  for (const Call& call : calls) {
    context() = base + ", combination " + std::to_string(static_cast<int>(call.combination)) + ", trim " +
                std::to_string(call.trim);
    const CombinePlan plan(0, table.rows(), 1, codes, call.combination);
    const std::vector<std::int64_t> words = plan.words();
    std::vector<std::vector<unsigned char>> before;
    for (Memory* target : targets)
      before.push_back(target == nullptr ? std::vector<unsigned char>{} : bytes_of(*target));
    in_orders([&] {
      const double* leaks = call.combination == Combination::kLeakyGradDrop ? leak.data() : nullptr;
      CombineCall{plan,
                  table.pointers().data(),
                  addresses.data(),
                  words.data(),
                  leaks,
                  nullptr,
                  nullptr,
                  false,
                  call.rng,
                  call.trim}
          .run(nullptr);
      std::uint64_t element = 0;
      for (std::size_t p = 0; p + 1 < P; ++p) {
        for (std::int64_t i = 0; i < params[p].columns; ++i, ++element) {
          std::vector<double> column;
          double sizes = 0;
          for (int k = 0; k < K; ++k) {
            const double* values = table.values(k, p);
            column.push_back(values == nullptr ? 0.0 : values[i]);
            sizes += std::fabs(column.back());
          }
          expect_near(dtype, get(dtype, targets[p]->begin() + i * size_of), result_of(call, column, element),
                      sizes, "the output");
        }
        expect(targets[p]->intact(), "bytes before an output");
        restore(before[p], *targets[p]);
      }
    });
  }
  context() = base;
}

struct States {
  std::vector<Param> params;
  std::vector<DType> dtypes;  // of the states
};

// Rows of two groups and more, absent ones and absent states among them.
void check_states(int K, int num_groups, const States& states, StateOperation operation) {
  const std::size_t P = states.params.size();
  const Table table(K, num_groups, states.params, most_reach);
  std::vector<std::unique_ptr<Memory>> memory(K * P);
  std::vector<std::uintptr_t> addresses(K * P);
  std::vector<std::vector<double>> old(K * P);
  std::vector<std::int64_t> numels;
  std::vector<DType> row_dtypes;
  std::vector<std::int32_t> groups;
  for (std::size_t p = 0; p < P; ++p) {
    numels.push_back(states.params[p].columns);
    row_dtypes.push_back(states.params[p].dtype);
    groups.push_back(states.params[p].group);
    const std::int64_t size = mtl::item_size(states.dtypes[p]);
    for (int k = 0; k < K; ++k) {
      const std::size_t n = k * P + p;
      if (table.pointers()[n] == 0 && n % 2 == 0) continue;
      memory[n] = std::make_unique<Memory>(numels[p] * size, draw(4) == 0 ? static_cast<int>(size) : 0);
      addresses[n] = memory[n]->address();
      for (std::int64_t i = 0; i < numels[p]; ++i) {
        old[n].push_back(std::fabs(draw_exact()));
        put(states.dtypes[p], memory[n]->begin() + i * size, old[n].back());
      }
    }
  }
  std::vector<double> keep(num_groups * K), gain(keep.size()), sums(keep.size()), exact(keep.size());
  for (double& x : keep) x = draw(3) / 2.0;
  for (double& x : gain) x = draw(3) / 2.0;
  const mtl::RowTable sizes{
      K, static_cast<std::int64_t>(P), nullptr, numels.data(), states.dtypes.data(), groups.data()};
  const StatePlan plan(0, sizes, row_dtypes, num_groups, operation);
  const std::vector<std::int64_t> words = plan.words();
  std::vector<double> workspace(plan.sum_doubles(), NAN);
  std::vector<unsigned> counters(plan.num_counters());
  std::vector<std::vector<unsigned char>> before;
  for (const auto& state : memory) before.push_back(state ? bytes_of(*state) : std::vector<unsigned char>{});
  std::vector<double> first;
  in_orders([&] {
    std::fill(sums.begin(), sums.end(), NAN);
    StateUpdate{plan,
                table.pointers().data(),
                addresses.data(),
                words.data(),
                workspace.data(),
                counters.data(),
                {operation, keep.data(), gain.data(), 0.5},
                sums.data()}
        .run(nullptr);
    expect(std::all_of(counters.begin(), counters.end(), [](unsigned n) { return n == 0; }), "counters");
    if (first.empty()) first = sums;
    expect(same_bits(first, sums), "the same sums in every order");
    std::fill(exact.begin(), exact.end(), 0.0);
    for (std::size_t n = 0; n < memory.size(); ++n) {
      if (!memory[n]) continue;
      const std::size_t p = n % P, k = n / P, place = groups[p] * K + k;
      const double* g = table.values(static_cast<int>(k), p);
      for (std::int64_t i = 0; i < numels[p]; ++i) {
        const DType dtype = states.dtypes[p];
        const double x = g == nullptr ? 0.0 : g[i], s = old[n][i];
        const double now = get(dtype, memory[n]->begin() + i * mtl::item_size(dtype));
        expect_near(dtype, now,
                    operation == StateOperation::kAverage ? keep[place] * s + gain[place] * x
                                                          : s + gain[place] * x * x,
                    8, "the state");
        exact[place] += operation == StateOperation::kAverage ? now * now : x * x / std::sqrt(now + 0.5);
      }
      expect(memory[n]->intact(), "bytes before a state");
      restore(before[n], *memory[n]);
    }
    for (std::size_t n = 0; n < sums.size(); ++n)
      expect(std::fabs(sums[n] - exact[n]) <= 1e-12 * exact[n], "the sum");
  });
}

}  // namespace

void test_columns(DType dtype) {
  const std::vector<int> tasks =
      kForRaces ? std::vector<int>{2, 9} : std::vector<int>{1, 2, 5, 8, 9, 17, 128};
  for (const int K : tasks) {
    context() = "columns, dtype " + std::to_string(static_cast<int>(dtype)) + ", K = " + std::to_string(K);
    set_device(1 + draw(2), 1);
    const std::int64_t vector = 16 / mtl::item_size(dtype), step = 256 * vector;
    std::vector<std::int64_t> sizes{1, 7, vector, 3, step + 5, 130};
    if (!kForRaces && K <= 9) sizes.push_back(3 * step + 1);
    check_columns(dtype, K, sizes);
  }
}

void test_states(DType rows) {
  for (const auto operation : {StateOperation::kAverage, StateOperation::kSquares}) {
    for (const DType state : kDTypes) {
      context() = "states, dtypes " + std::to_string(static_cast<int>(rows)) + " and " +
                  std::to_string(static_cast<int>(state));
      set_device(1 + draw(40), 1);
      const auto size = static_cast<int>(mtl::item_size(rows));
      const std::int64_t step = 256 * 16 / size;
      check_states(3, 2,
                   {{{rows, 7, 1}, {rows, step + 3, 0, size}, {rows, 0, 1}, {rows, 5 * step, 1}},
                    std::vector<DType>(4, state)},
                   operation);
    }
    context() = "states of all dtypes";
    std::vector<Param> params;
    std::vector<DType> dtypes;
    for (int p = 0; p < 12; ++p) {
      params.push_back({kDTypes[draw(4)], draw(90), draw(3)});
      dtypes.push_back(kDTypes[draw(4)]);
    }
    check_states(kForRaces ? 5 : 128, 4, {params, dtypes}, operation);
    check_states(2, 1, {}, operation);
    set_device(64, 2);  // more slices than a pod holds
    check_states(1, 1, {{{rows, 200'000}}, {DType::kFloat32}}, operation);
  }
}

}  // namespace test
