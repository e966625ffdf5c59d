// The CPU kernels of every instruction set against sums in double: K from 1 to 128, every dtype, absent rows,
// groups, odd lengths, rows that start anywhere, outputs in place, of another dtype or added to; and the
// operations that need the rows element by element.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "combine.h"
#include "elementwise.h"
#include "gram.h"

namespace {

using namespace mtl;

std::mt19937_64 generator(1);

int draw(int n) { return static_cast<int>(generator() % static_cast<std::uint64_t>(n)); }

// Multiples of 1/8 from -4 to 4: exact in every dtype.
double draw_value() { return (draw(65) - 32) / 8.0; }

// Such a value as a half.
std::uint16_t half_bits(double x) {
  if (x == 0) return 0;
  int exponent = 0;
  const double fraction = std::frexp(std::fabs(x), &exponent);
  const int mantissa = static_cast<int>((fraction * 2 - 1) * 1024);
  return static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

double from_half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

void put(DType dtype, char* to, double x) {
  if (dtype == DType::kFloat64) {
    std::memcpy(to, &x, 8);
    return;
  }
  if (dtype == DType::kFloat16) {
    const std::uint16_t bits = half_bits(x);
    std::memcpy(to, &bits, 2);
    return;
  }
  const float single = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  const auto high = static_cast<std::uint16_t>(bits >> 16);
  if (dtype == DType::kBFloat16) std::memcpy(to, &high, 2);
  if (dtype == DType::kFloat32) std::memcpy(to, &bits, 4);
}

double get(DType dtype, const char* from) {
  if (dtype == DType::kFloat64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  std::uint32_t bits = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(&bits, from, 4);
  } else {
    std::uint16_t narrow;
    std::memcpy(&narrow, from, 2);
    if (dtype == DType::kFloat16) return from_half(narrow);
    bits = static_cast<std::uint32_t>(narrow) << 16;
  }
  float single;
  std::memcpy(&single, &bits, 4);
  return single;
}

// Blocks of exactly the bytes asked for, so that the sanitizer sees any access beyond them.
struct Memory {
  std::vector<std::unique_ptr<char[]>> blocks;

  std::uintptr_t add(DType dtype, std::int64_t n) {
    const std::int64_t offset = draw(5) * item_size(dtype);
    blocks.emplace_back(new char[offset + n * item_size(dtype)]);
    char* begin = blocks.back().get() + offset;
    for (std::int64_t i = 0; i < n; ++i) put(dtype, begin + i * item_size(dtype), draw_value());
    return reinterpret_cast<std::uintptr_t>(begin);
  }
};

bool check(int K) {
  const int P = draw(6), num_groups = 1 + draw(3);
  Memory memory;
  std::vector<std::int64_t> numels(P);
  std::vector<DType> dtypes(P), out_dtypes(P);
  const bool accumulate = draw(3) == 0;
  std::vector<std::int32_t> groups(P);
  std::vector<std::uintptr_t> pointers(K * P), out(P);
  const int longest[] = {4, 100, 1000, K > 24 ? 5000 : 40000};
  for (int p = 0; p < P; ++p) {
    numels[p] = draw(longest[draw(4)]);
    dtypes[p] = static_cast<DType>(draw(4));
    groups[p] = draw(num_groups);
    bool reached = false;
    for (int k = 0; k < K; ++k) {
      if (draw(4) == 0) continue;
      pointers[k * P + p] = memory.add(dtypes[p], numels[p]);
      reached = true;
    }
    const bool in_place = !accumulate && draw(2) == 0;
    out_dtypes[p] = in_place || draw(2) == 0 ? dtypes[p] : static_cast<DType>(draw(4));
    out[p] = in_place ? pointers[draw(K) * P + p] : memory.add(out_dtypes[p], numels[p]);
    if (!reached) out[p] = 0;
  }
  const RowTable rows{K, P, pointers.data(), numels.data(), dtypes.data(), groups.data()};

  std::vector<double> gram(num_groups * K * K), exact_gram(gram.size()), weights(num_groups * K);
  for (double& weight : weights) weight = draw_value();
  std::vector<std::vector<double>> exact_out(P);
  for (int p = 0; p < P; ++p) {
    exact_out[p].assign(numels[p], 0);
    for (std::int64_t i = 0; accumulate && out[p] != 0 && i < numels[p]; ++i)
      exact_out[p][i] =
          get(out_dtypes[p], reinterpret_cast<const char*>(out[p]) + i * item_size(out_dtypes[p]));
    std::vector<int> task;
    std::vector<std::vector<double>> value;
    for (int k = 0; k < K; ++k) {
      const auto* row = reinterpret_cast<const char*>(pointers[k * P + p]);
      if (row == nullptr) continue;
      task.push_back(k);
      value.emplace_back(numels[p]);
      for (std::int64_t i = 0; i < numels[p]; ++i) {
        value.back()[i] = get(dtypes[p], row + i * item_size(dtypes[p]));
        exact_out[p][i] += weights[groups[p] * K + k] * value.back()[i];
      }
    }
    for (std::size_t a = 0; a < task.size(); ++a) {
      for (std::size_t b = 0; b < task.size(); ++b) {
        double total = 0;
        for (std::int64_t i = 0; i < numels[p]; ++i) total += value[a][i] * value[b][i];
        exact_gram[(groups[p] * K + task[a]) * K + task[b]] += total;
      }
    }
  }
  // Every product and every sum of these values is exact, in float as in double.
  cpu::gram(rows, num_groups, gram.data(), 3);
  if (gram != exact_gram) return false;
  cpu::combine(rows, weights.data(), {out.data(), out_dtypes.data(), accumulate}, 3);
  for (int p = 0; p < P; ++p) {
    const double epsilon[] = {0x1p-24, 0, 0x1p-8, 0x1p-11};
    const DType dtype = out_dtypes[p];
    const auto* written = reinterpret_cast<const char*>(out[p]);
    for (std::int64_t i = 0; written != nullptr && i < numels[p]; ++i) {
      const double found = get(dtype, written + i * item_size(dtype));
      if (std::fabs(found - exact_out[p][i]) > epsilon[static_cast<int>(dtype)] * std::fabs(exact_out[p][i]))
        return false;
    }
  }
  return true;
}

bool close(DType dtype, double found, double exact, double sizes) {
  const double epsilon[] = {0x1p-24, 0, 0x1p-8, 0x1p-11};
  return std::fabs(found - exact) <= epsilon[static_cast<int>(dtype)] * std::fabs(exact) + 0x1p-44 * sizes;
}

// One parameter of K rows and its outputs: in place, or on its own.
bool check_columns(int K) {
  Memory memory;
  const auto dtype = static_cast<DType>(draw(4));
  const std::int64_t n = draw(K > 24 ? 300 : 3000), size = item_size(dtype), before = draw(7);
  std::vector<std::int64_t> numels{before, n};
  std::vector<DType> dtypes{dtype, dtype};
  std::vector<std::int32_t> groups{0, 0};
  std::vector<std::uintptr_t> pointers(2 * K);
  for (int k = 0; k < K; ++k) {
    pointers[2 * k] = memory.add(dtype, before);
    if (k == K / 2 || draw(4) > 0) pointers[2 * k + 1] = memory.add(dtype, n);
  }
  std::vector<std::vector<double>> columns(n, std::vector<double>(K));
  for (int k = 0; k < K; ++k)
    for (std::int64_t i = 0; pointers[2 * k + 1] != 0 && i < n; ++i)
      columns[i][k] = get(dtype, reinterpret_cast<const char*>(pointers[2 * k + 1]) + i * size);
  std::vector<double> leak(K);
  for (double& share : leak) share = draw(9) / 8.0;
  const std::int64_t rng[2] = {draw(1000), draw(1000)};
  const int trim = draw((K - 1) / 2 + 1);
  const RowTable rows{K, 2, pointers.data(), numels.data(), dtypes.data(), groups.data()};
  const std::uintptr_t in_place = pointers[2 * (K / 2) + 1];
  std::vector<char> kept(n * size);
  std::memcpy(kept.data(), reinterpret_cast<const char*>(in_place), n * size);
  for (const auto operation : {ColumnOperation::kTrimmedMean, ColumnOperation::kGradDrop}) {
    std::memcpy(reinterpret_cast<char*>(in_place), kept.data(), n * size);
    const bool leaks = draw(2) == 0;
    const std::uintptr_t out[2] = {0, draw(2) == 0 ? in_place : memory.add(dtype, n)};
    cpu::reduce_columns(rows, {operation, trim, leaks ? leak.data() : nullptr, rng}, out, 3);
    for (std::int64_t i = 0; i < n; ++i) {
      std::vector<double>& column = columns[i];
      double exact = 0, total = 0, sizes = 0;
      for (double g : column) total += g, sizes += std::fabs(g);
      if (operation == ColumnOperation::kTrimmedMean) {
        std::vector<double> sorted = column;
        std::sort(sorted.begin(), sorted.end());
        for (int k = trim; k < K - trim; ++k) exact += sorted[k] / (K - 2 * trim);
      } else {
        const std::uint64_t element = before + i;
        const double U = threshold_of(threshold_words(rng, element / 4).word[element % 4]);
        const double P = sizes == 0 ? 0.5 : (1 + total / sizes) / 2;
        for (int k = 0; k < K; ++k)
          exact += column[k] * ((column[k] > 0 ? P > U : P < U) ? 1.0 : leaks ? leak[k] : 0.0);
      }
      if (!close(dtype, get(dtype, reinterpret_cast<const char*>(out[1]) + i * size), exact, sizes))
        return false;
    }
  }
  return true;
}

// K rows of two groups, absent ones among them, and their states.
bool check_states(int K) {
  Memory memory;
  const std::int64_t n = draw(3000), numels[] = {n, 5};
  const DType dtypes[] = {static_cast<DType>(draw(4)), static_cast<DType>(draw(4))};
  const DType row_dtypes[] = {static_cast<DType>(draw(4)), static_cast<DType>(draw(4))};
  const std::int32_t groups[] = {1, 0};
  std::vector<std::uintptr_t> states(2 * K), rows(2 * K);
  std::vector<double> keep(2 * K), gain(2 * K), sums(2 * K), expected(2 * K);
  for (int i = 0; i < 2 * K; ++i) {
    if (draw(4) > 0) rows[i] = memory.add(row_dtypes[i % 2], numels[i % 2]);
    if (rows[i] != 0 || draw(2) == 0) states[i] = memory.add(dtypes[i % 2], numels[i % 2]);
    keep[i] = draw(3) / 2.0;
    gain[i] = draw(3) / 2.0;
  }
  const RowTable state{K, 2, states.data(), numels, dtypes, groups};
  for (const auto operation : {StateOperation::kAverage, StateOperation::kSquares}) {
    std::vector<std::vector<double>> next(2 * K);
    for (int i = 0; i < 2 * K; ++i) {
      const int place = groups[i % 2] * K + i / 2;
      for (std::int64_t c = 0; states[i] != 0 && c < numels[i % 2]; ++c) {
        const DType s_type = dtypes[i % 2], g_type = row_dtypes[i % 2];
        char* at = reinterpret_cast<char*>(states[i]) + c * item_size(s_type);
        if (operation == StateOperation::kSquares) put(s_type, at, std::fabs(get(s_type, at)));
        const double s = get(s_type, at);
        const double g =
            rows[i] == 0 ? 0 : get(g_type, reinterpret_cast<const char*>(rows[i]) + c * item_size(g_type));
        next[i].push_back(operation == StateOperation::kAverage ? keep[place] * s + gain[place] * g
                                                                : s + gain[place] * g * g);
      }
    }
    cpu::update_state(state, rows.data(), row_dtypes, 2, {operation, keep.data(), gain.data(), 0.5},
                      sums.data(), 3);
    expected.assign(2 * K, 0);
    for (int i = 0; i < 2 * K; ++i) {
      for (std::size_t c = 0; c < next[i].size(); ++c) {
        const DType s_type = dtypes[i % 2], g_type = row_dtypes[i % 2];
        const double s = get(s_type, reinterpret_cast<const char*>(states[i]) + c * item_size(s_type));
        const double g =
            rows[i] == 0 ? 0 : get(g_type, reinterpret_cast<const char*>(rows[i]) + c * item_size(g_type));
        if (!close(s_type, s, next[i][c], 1)) return false;
        expected[groups[i % 2] * K + i / 2] +=
            operation == StateOperation::kAverage ? s * s : g * g / std::sqrt(s + 0.5);
      }
    }
    for (int i = 0; i < 2 * K; ++i)
      if (!(std::fabs(sums[i] - expected[i]) <= 1e-12 * expected[i])) return false;
  }
  return true;
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!cpu::use_isa(isa)) continue;
    for (int K = 1; K <= kMaxTasks; K += K < 34 || K == 127 ? 1 : 3) {
      if (check(K) && check_columns(K) && check_states(K)) continue;
      std::printf("failed: %s, K = %d\n", isa, K);
      return 1;
    }
  }
  std::puts("passed");
}
