// combine and its epilogues: every bit of every output, but for sums in float, which have a bound.
#include <algorithm>

#include "combine.h"
#include "combine_kernels.h"
#include "cuda_test.h"
#include "elements.h"

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

bool slow_double() { return emulation::options().single_to_double_ratio > 4; }

bool sums_in_float(DType in, DType out) {
  return slow_double() && in != DType::kFloat64 && out != DType::kFloat64;
}

struct Expected {
  double rounded, sum, error;
};

// What a sum of `count` terms in float may be off: each weight, product and sum rounded once, and the output.
double float_error(DType out, double sum, double absolute, int count) {
  const bool half = out != DType::kFloat32;
  const int digits = out == DType::kBFloat16 ? 8 : 11, least = out == DType::kBFloat16 ? -126 : -14;
  const double unit = half ? std::ldexp(1.0, std::max(std::ilogb(sum), least) - digits + 1) : 0.0;
  return (count + 1) * 0x1p-24 * absolute + 0.5 * unit;
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

  std::vector<std::vector<Expected>> expected(outputs.size());
  bool finite = true;
  for (std::size_t p = 0; p < outputs.size(); ++p) {
    if (outputs[p].dtype < 0) continue;
    const auto dtype = static_cast<DType>(outputs[p].dtype);
    const Param& param = table.params[p];
    for (std::int64_t i = 0; i < param.columns; ++i) {
      double sum = 0, absolute = 0;
      int count = 0;
      const auto add = [&](double term) {
        sum += term;
        absolute += std::fabs(term);
        ++count;
      };
      for (int k = 0; k < K; ++k)
        if (const double* values = table.values(k, p)) add(weights[param.group * K + k] * scale * values[i]);
      if (epilogue.accumulate) add(get(dtype, targets[p]->begin() + i * mtl::item_size(dtype)));
      const double rounded = quantized(dtype, sum);
      expected[p].push_back(
          {rounded, sum, sums_in_float(param.dtype, dtype) ? float_error(dtype, sum, absolute, count) : 0.0});
      finite = finite && std::isfinite(rounded);
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
        const Expected& wanted = expected[p][i];
        if (same_numbers(written, wanted.rounded)) continue;
        if (std::fabs(written - wanted.sum) <= wanted.error) continue;
        context() += ", parameter " + std::to_string(p) + ", column " + std::to_string(i) + ": " +
                     std::to_string(written) + " instead of " + std::to_string(wanted.rounded);
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
  const mtl::cuda::CombineKernel kernel = mtl::cuda::combine_kernel(in, out, slow_double());
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
  for (const std::int64_t at : {0, 1030, 4999, 5001}) {
    for (const double value : {1e30, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      for (const DType out : kDTypes) {
        context() = "found_inf, dtype " + std::to_string(static_cast<int>(out));
        const Table table(
            2, 1, {{DType::kFloat32, 5002}}, all_reach,  // the last two in no vector
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

namespace {

template <class Half>
void expect_rounded(double x, std::uint16_t expected) {
  if (mtl::cuda::rounded<Half>(x).bits == expected &&
      mtl::cuda::rounded<Half>(-x).bits == (expected | 0x8000))
    return;
  char number[64];
  std::snprintf(number, sizeof number, ", %a", x);
  context() += number;
  expect(false, "rounded once");
}

// Around every number of the format, and around what is halfway to the next: each digit of a double that
// could decide alone. Then doubles of all sizes, and what is no number.
template <class Half>
void test_rounding_to(DType dtype, std::uint16_t infinity) {
  context() = "rounding to dtype " + std::to_string(static_cast<int>(dtype));
  const auto value = [&](int bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    return get(dtype, reinterpret_cast<const unsigned char*>(&half));
  };
  for (int bits = 0; bits < infinity; ++bits) {
    const double low = value(bits), high = bits + 1 < infinity ? value(bits + 1) : 2 * low - value(bits - 1);
    const double middle = (low + high) / 2;
    const auto lower = static_cast<std::uint16_t>(bits), upper = static_cast<std::uint16_t>(bits + 1);
    expect_rounded<Half>(low, lower);
    expect_rounded<Half>(middle, bits % 2 == 0 ? lower : upper);
    for (int digit = 12; digit <= 52; ++digit) {
      const double part = std::ldexp(1.0, std::ilogb(middle) - digit);
      expect_rounded<Half>(low + part, lower);
      expect_rounded<Half>(middle - part, lower);
      expect_rounded<Half>(middle + part, upper);
      expect_rounded<Half>(high - part, upper);
    }
  }
  for (int n = 0; n < 1 << 20; ++n) {
    const double x = std::ldexp(1 + draw(1 << 30) * 0x1p-30, draw(320) - 160);
    unsigned char bytes[2];
    put(dtype, bytes, quantized(dtype, x));
    std::uint16_t expected;
    std::memcpy(&expected, bytes, sizeof expected);
    expect_rounded<Half>(x, expected);
  }
  for (const double large : {1e39, 1e300, static_cast<double>(INFINITY)})
    expect_rounded<Half>(large, infinity);
  for (const double small : {1e-45, 1e-60, 5e-324}) expect_rounded<Half>(small, 0);
  for (int digit = 0; digit < 52; ++digit) {
    const auto bits = static_cast<long long>(0x7ff0000000000000u | 1ull << digit);
    for (const double nan : {__longlong_as_double(bits), -__longlong_as_double(bits)}) {
      const int rounded = mtl::cuda::rounded<Half>(nan).bits & 0x7fff, quiet = infinity >> 1 & ~infinity;
      expect(rounded > infinity && (rounded & quiet) != 0, "a quiet NaN");
    }
  }
}

// Every element beside one that is finite, on either side of it.
template <class Half>
void test_finite_halves(std::uint16_t infinity) {
  context() = "finite halves";
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const Half x{static_cast<std::uint16_t>(bits)},
        largest{static_cast<std::uint16_t>(0x8000 | (infinity - 1))};
    const bool finite = (bits & infinity) != infinity;
    expect(mtl::cuda::all_finite<Half, 1>({x}) == finite, "one element");
    expect(mtl::cuda::all_finite<Half, 4>({largest, largest, x, largest}) == finite, "the lower of two");
    expect(mtl::cuda::all_finite<Half, 4>({largest, x, largest, largest}) == finite, "the upper of two");
  }
}

}  // namespace

void test_rounding() {
  if (kForRaces) return;
  test_rounding_to<mtl::cuda::BFloat16>(DType::kBFloat16, 0x7f80);
  test_rounding_to<mtl::cuda::Float16>(DType::kFloat16, 0x7c00);
  test_finite_halves<mtl::cuda::BFloat16>(0x7f80);
  test_finite_halves<mtl::cuda::Float16>(0x7c00);
  context() = "finite numbers";
  for (const double x : {0.0, -0.0, 5e-324, -1.7976931348623157e308}) {
    expect(mtl::cuda::all_finite({x, 1.0}) && mtl::cuda::all_finite({1.0, x}), "doubles");
    const auto single = static_cast<float>(x);
    expect(mtl::cuda::all_finite({single, 1.0f}) == std::isfinite(single), "floats");
  }
  for (const float x : {INFINITY, -INFINITY, NAN, -NAN}) {
    const double wide = x;
    expect(!mtl::cuda::all_finite({x, 1.0f}) && !mtl::cuda::all_finite({1.0f, x}), "floats that are not");
    expect(!mtl::cuda::all_finite({wide, 1.0}) && !mtl::cuda::all_finite({1.0, wide}),
           "doubles that are not");
  }
}

}  // namespace test
