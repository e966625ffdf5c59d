// combine and its epilogues: every bit of every output.
#include <algorithm>

#include "combine.h"
#include "combine_kernels.h"
#include "cuda_test.h"

namespace test {
namespace {

using mtl::cuda::CombineCall;
using mtl::cuda::CombinePlan;

struct Output {
  int dtype = -1;  // -1: none
  int row = -1;    // the output is this row
  int offset = 0;
};

struct Epilogue {
  bool accumulate = false;
  bool scaled = false;
  bool looks_for_inf = false;
  float found_before = 0;
};

void copy_bytes(const Memory& from, std::vector<unsigned char>* to) {
  to->assign(from.begin(), from.begin() + from.bytes());
}

bool same_numbers(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

void check(
    const Table& table, const std::vector<Output>& outputs, const Epilogue& epilogue,
    const std::function<double(int)>& weight_of = [](int) { return draw_normal(); }) {
  const int K = table.num_tasks;
  std::vector<int> codes;
  std::vector<std::unique_ptr<Memory>> own(outputs.size());
  std::vector<Memory*> targets;
  std::vector<std::uintptr_t> addresses;
  for (std::size_t p = 0; p < outputs.size(); ++p) {
    const Output& output = outputs[p];
    Memory* target = output.row >= 0 ? table.memory(output.row, p) : nullptr;
    if (output.dtype >= 0 && target == nullptr) {
      const auto dtype = static_cast<DType>(output.dtype);
      const std::int64_t size = mtl::item_size(dtype);
      own[p] = std::make_unique<Memory>(table.params[p].columns * size, output.offset);
      target = own[p].get();
      if (epilogue.accumulate)
        for (std::int64_t i = 0; i < table.params[p].columns; ++i)
          put(dtype, target->begin() + i * size, draw_exact());
    }
    codes.push_back(output.dtype);
    targets.push_back(target);
    addresses.push_back(target == nullptr ? 0 : target->address());
  }
  std::vector<double> weights(static_cast<std::size_t>(table.num_groups) * K);
  for (std::size_t n = 0; n < weights.size(); ++n) weights[n] = weight_of(static_cast<int>(n) % K);
  const double scale = epilogue.scaled ? 0.37 : 1.0;

  std::vector<std::vector<double>> expected(outputs.size());
  bool finite = true;
  for (std::size_t p = 0; p < outputs.size(); ++p) {
    if (outputs[p].dtype < 0) continue;
    const auto dtype = static_cast<DType>(outputs[p].dtype);
    const Param& param = table.params[p];
    for (std::int64_t i = 0; i < param.columns; ++i) {
      double sum = 0;
      for (int k = 0; k < K; ++k)
        if (const double* values = table.values(k, p))
          sum += weights[param.group * K + k] * scale * values[i];
      if (epilogue.accumulate) sum += get(dtype, targets[p]->begin() + i * mtl::item_size(dtype));
      expected[p].push_back(quantized(dtype, sum));
      finite = finite && std::isfinite(expected[p].back());
    }
  }

  const CombinePlan plan(0, table.rows(), table.num_groups, codes);
  const std::vector<std::int64_t> words = plan.words();
  const std::size_t params = outputs.size();
  std::vector<std::vector<unsigned char>> before(static_cast<std::size_t>(K + 1) * params);
  const auto each_memory = [&](const std::function<void(std::size_t n, Memory& memory)>& use) {
    for (std::size_t p = 0; p < params; ++p) {
      for (int k = 0; k < K; ++k)
        if (Memory* row = table.memory(k, p)) use(static_cast<std::size_t>(k) * params + p, *row);
      if (own[p]) use(static_cast<std::size_t>(K) * params + p, *own[p]);
    }
  };
  each_memory([&](std::size_t n, Memory& memory) { copy_bytes(memory, &before[n]); });
  in_orders([&] {
    each_memory([&](std::size_t n, Memory& memory) {
      std::copy(before[n].begin(), before[n].end(), memory.begin());
    });
    float found_inf = epilogue.found_before;
    CombineCall{plan,
                table.pointers().data(),
                addresses.data(),
                words.data(),
                weights.data(),
                epilogue.scaled ? &scale : nullptr,
                epilogue.looks_for_inf ? &found_inf : nullptr,
                epilogue.accumulate}
        .run(nullptr);
    const bool found = epilogue.found_before != 0 || (epilogue.looks_for_inf && !finite);
    expect(found_inf == (found ? 1.0f : 0.0f), "found_inf");
    for (std::size_t p = 0; p < params; ++p) {
      for (std::size_t i = 0; i < expected[p].size(); ++i) {
        const auto dtype = static_cast<DType>(outputs[p].dtype);
        const double written =
            get(dtype, targets[p]->begin() + i * static_cast<std::size_t>(mtl::item_size(dtype)));
        if (same_numbers(written, expected[p][i])) continue;
        context() += ", parameter " + std::to_string(p) + ", column " + std::to_string(i) + ": " +
                     std::to_string(written) + " instead of " + std::to_string(expected[p][i]);
        expect(false, "the output");
      }
    }
    each_memory([&](std::size_t n, Memory& memory) {
      expect(memory.intact(), "bytes before a row or an output");
      if (targets[n % params] == &memory) return;
      expect(std::equal(before[n].begin(), before[n].end(), memory.begin()), "rows stay as they are");
    });
  });
}

std::vector<std::int64_t> border_sizes(DType in, DType out) {
  const mtl::cuda::CombineKernel kernel = mtl::cuda::combine_kernel(in, out);
  const std::int64_t vector = 16 / mtl::item_size(in), step = kernel.step_columns,
                     tile = step * kernel.max_steps;
  if (kForRaces) return {0, vector - 1, step + vector + 1, tile + 1};
  return {0,        1,    vector - 1,  vector, vector + 1, step - 1, step, step + vector + 1,
          tile - 1, tile, 2 * tile + 1};
}

int draw_offset(DType dtype) {
  return draw(4) == 0 ? static_cast<int>(mtl::item_size(dtype)) *
                            (1 + draw(16 / static_cast<int>(mtl::item_size(dtype)) - 1))
                      : 0;
}

// Outputs of one dtype at all sizes; every third parameter has none or, where the dtype allows, is in place.
void test_pair(DType in, DType out, int K, const Epilogue& epilogue) {
  context() = "dtypes " + std::to_string(static_cast<int>(in)) + " to " +
              std::to_string(static_cast<int>(out)) + ", K = " + std::to_string(K);
  std::vector<Param> params;
  std::vector<Output> outputs;
  const bool in_place = in == out && !epilogue.accumulate;
  for (const std::int64_t size : border_sizes(in, out)) {
    if (K > 16 && size > 3000) continue;
    const std::size_t p = params.size();
    Output output{static_cast<int>(out)};
    if (p % 3 == 1 && in_place) output.row = static_cast<int>(p) * 5 % K;
    params.push_back({in, size, static_cast<int>(p) % 2 * 2, p % 4 == 3 ? draw_offset(in) : 0});
    if (p % 5 == 4 && output.row < 0) output.offset = draw_offset(out);
    outputs.push_back(output);
  }
  params.push_back({in, 100, 1});
  outputs.push_back({});
  params.push_back({in, 100, 0});  // no task reaches it
  outputs.push_back({static_cast<int>(out)});
  const auto reaches = [&](int k, std::size_t p) {
    return p + 1 < params.size() && (k == outputs[p].row || most_reach(k, p));
  };
  check(Table(K, 3, params, reaches), outputs, epilogue);
}

}  // namespace

void test_combine(DType rows) {
  const std::vector<int> sizes =
      kForRaces ? std::vector<int>{2, 9, 17} : std::vector<int>{1, 2, 7, 8, 9, 17, 128};
  for (const int K : sizes) {
    for (const DType out : kDTypes) {
      Epilogue epilogue;
      epilogue.accumulate = draw(3) == 0;
      epilogue.scaled = draw(2) == 0;
      epilogue.looks_for_inf = draw(2) == 0;
      if (draw(2) == 0) {
        set_device(1, 1);  // long tiles, and several of them in a block
      } else {
        set_device(5, 2);
      }
      test_pair(rows, out, K, epilogue);
    }
  }
}

void test_combine_mixed() {
  for (const int K : {1, 3, 8, 9, 16, 33, 128}) {
    context() = "mixed, K = " + std::to_string(K);
    set_device(1 + draw(4), 1 + draw(2));
    std::vector<Param> params;
    std::vector<Output> outputs;
    const int groups = 1 + draw(4);
    const bool in_place = draw(2) == 0;
    for (int p = 0; p < 24; ++p) {
      const DType dtype = kDTypes[draw(4)], out = kDTypes[draw(4)];
      params.push_back({dtype, draw(3000 / K + 60), draw(groups), draw_offset(dtype)});
      Output output;
      if (draw(6) > 0) output = {static_cast<int>(out), -1, draw_offset(out)};
      if (in_place && draw(2) == 0) output = {static_cast<int>(dtype), draw(K), 0};
      outputs.push_back(output);
    }
    const auto reaches = [&](int k, std::size_t p) { return k == outputs[p].row || draw(5) > 0; };
    check(Table(K, groups, params, reaches), outputs, {!in_place, true, true});
  }
  // What a task does not reach takes no part, whatever its weight.
  context() = "weights that are not finite";
  for (const DType out : {DType::kFloat32, DType::kBFloat16}) {
    const auto code = static_cast<int>(out);
    const Table table(3, 1, {{DType::kFloat32, 2000}, {DType::kFloat32, 7, 0, 4}},
                      [](int k, std::size_t) { return k != 1; });
    check(table, {{code}, {code}}, {},
          [](int k) { return k == 1 ? static_cast<double>(INFINITY) : draw_normal(); });
  }
  context() = "nothing to write";
  check(Table(3, 2, {}), {}, {});
  check(Table(3, 1, {{DType::kFloat32, 5}}), {{}}, {});

  // One element that is not finite, in any tile, as it is or after rounding; and one that is finite all the
  // same.
  set_device(2, 1);
  for (const std::int64_t at : {0, 1030, 4999}) {
    for (const double value : {1e30, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      for (const DType out : kDTypes) {
        context() = "found_inf, dtype " + std::to_string(static_cast<int>(out));
        const Table table(
            2, 1, {{DType::kFloat32, 5000}}, all_reach,
            [&](int k, std::size_t, std::int64_t n) { return k == 1 && n == at ? value : 1.0; });
        for (const float before : {0.0f, 1.0f})
          check(table, {{static_cast<int>(out)}}, {false, false, true, before}, [](int) { return 2.0; });
      }
    }
  }
  // Halfway cases, ties to even, subnormals and what lies just below the largest number.
  context() = "rounding";
  const double special[] = {1 + 0x1p-8,        1 + 0x1p-11, 1 + 0x1p-24,    1 + 0x1p-8 + 0x1p-40,
                            1 + 0x1.8p-10,     65504.0,     65519.999999,   65520.0,
                            0x1p-24,           0x1p-25,     0x1.000001p-25, 0x1.8p-24,
                            0x1p-14 - 0x1p-26, 0x1.fep127,  0x1.feffffp127, 0x1.ffp127,
                            0x1.fffffep127,    0x1p-133,    0x1p-134,       0x1.00001p-134,
                            0x1p-149,          0x1.8p-149,  1e-300,         1e300};
  for (const DType out : kDTypes) {
    const Table table(
        1, 1, {{DType::kFloat64, 96}, {DType::kFloat64, 25, 0, 8}}, all_reach,
        [&](int, std::size_t, std::int64_t n) { return special[n % 24] * (n % 48 < 24 ? 1 : -1); });
    check(table, {{static_cast<int>(out)}, {static_cast<int>(out)}}, {}, [](int) { return 1.0; });
  }
}

}  // namespace test
