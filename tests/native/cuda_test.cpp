// The host functions of csrc/cuda and their kernels, over the emulation, against sums in long double.
// `cuda_test` runs all cases, `cuda_test <case> ...` some of them.
#include "cuda_test.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "mtl_kernels/solvers/all.h"

namespace test {
namespace {

std::mt19937_64& generator() {
  static std::mt19937_64 generator(1);
  return generator;
}

constexpr unsigned char kFiller = 0xff;

// Of a 16-bit or 32-bit format: bits of the fraction with the leading one, and the least exponent.
double rounded(double x, int digits, int least_exponent) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), least_exponent) - digits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
}

double with_largest(double x, double largest) {
  return std::fabs(x) > largest ? std::copysign(static_cast<double>(INFINITY), x) : x;
}

template <class T>
T loaded(const unsigned char* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
void store(unsigned char* to, T x) {
  std::memcpy(to, &x, sizeof x);
}

template <class Solver>
Solution solve_by(const SolverCase& solver, mtl::Problem problem) {
  const auto K = static_cast<std::size_t>(problem.num_tasks);
  Solution solution{std::vector<double>(K, NAN), std::vector<double>(2, NAN),
                    std::vector<double>(Solver::state_doubles(problem.num_tasks), 0.0)};
  std::vector<double> inputs(K);
  for (std::size_t k = 0; k < K; ++k) inputs[k] = input_of(static_cast<int>(k));
  std::vector<double> scratch(Solver::scratch_doubles(problem.num_tasks), NAN);
  problem.options = solver.options.data();
  problem.inputs = solver.has_inputs ? inputs.data() : nullptr;
  problem.state = solution.state.data();
  problem.weights = solution.weights.data();
  problem.certificate = solution.certificate.data();
  problem.scratch = scratch.data();
  Solver::solve(mtl::SerialTeam{}, problem);
  return solution;
}

template <class... Solvers>
Solution solve_by_name(const SolverCase& solver, const mtl::Problem& problem, mtl::SolverList<Solvers...>) {
  Solution found;
  ((std::string(Solvers::name) == solver.name ? void(found = solve_by<Solvers>(solver, problem)) : void()),
   ...);
  return found;
}

// Whether two vectors of weights, or states, differ by little more than rounding.
bool close(const double* a, const double* b, std::size_t size) {
  double largest = 0;
  for (std::size_t n = 0; n < size; ++n) largest = std::max(largest, std::fabs(b[n]));
  for (std::size_t n = 0; n < size; ++n)
    if (!(std::fabs(a[n] - b[n]) <= 1e-7 * largest)) return false;
  return true;
}

double squared_norm(int num_tasks, const double* gram, const double* weights) {
  double total = 0;
  for (int i = 0; i < num_tasks; ++i)
    for (int j = 0; j < num_tasks; ++j)
      if (weights[i] * weights[j] != 0) total += weights[i] * gram[i * num_tasks + j] * weights[j];
  return total;
}

// On a GPU with little double arithmetic.
void on_slow_double(const std::function<void()>& test) {
  const int before = std::exchange(emulation::options().single_to_double_ratio, 64);
  test();
  emulation::options().single_to_double_ratio = before;
}

}  // namespace

std::string& context() {
  static std::string text;
  return text;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s: %s\n", context().c_str(), what);
  std::exit(1);
}

void set_device(int multiprocessors, int blocks_per_multiprocessor) {
  emulation::options().multiprocessors = multiprocessors;
  emulation::options().blocks_per_multiprocessor = blocks_per_multiprocessor;
}

void in_orders(const std::function<void()>& launch) {
  using emulation::Order;
  static unsigned turn = 0;
  emulation::Options& set = emulation::options();
  for (int n = 0; n < (kForRaces ? 1 : 2); ++n, ++turn) {
    set.blocks = set.threads = turn % 2 == 0   ? Order::kRandom
                               : turn % 4 == 1 ? Order::kDescending
                                               : Order::kAscending;
    set.seed += 1;
    launch();
  }
}

int draw(int n) { return static_cast<int>(generator()() % static_cast<std::uint64_t>(n)); }

double draw_exact() { return (draw(65) - 32) / 8.0; }

double draw_normal() {
  static std::normal_distribution<double> normal;
  return normal(generator());
}

double quantized(DType dtype, double x) {
  switch (dtype) {
    case DType::kFloat64:
      return x;
    case DType::kFloat32:
      return static_cast<float>(x);
    case DType::kBFloat16:
      return with_largest(rounded(x, 8, -126), 0x1.fep127);
    default:
      return with_largest(rounded(x, 11, -14), 65504.0);
  }
}

void put(DType dtype, unsigned char* to, double x) {
  switch (dtype) {
    case DType::kFloat64:
      return store(to, x);
    case DType::kFloat32:
      return store(to, static_cast<float>(x));
    case DType::kBFloat16: {
      unsigned char bytes[4];
      store(bytes, static_cast<float>(x));
      return store(to, static_cast<std::uint16_t>(loaded<std::uint32_t>(bytes) >> 16));
    }
    default:
      return store(to, static_cast<_Float16>(x));
  }
}

double get(DType dtype, const unsigned char* from) {
  switch (dtype) {
    case DType::kFloat64:
      return loaded<double>(from);
    case DType::kFloat32:
      return loaded<float>(from);
    case DType::kBFloat16: {
      unsigned char bytes[4];
      store(bytes, static_cast<std::uint32_t>(loaded<std::uint16_t>(from)) << 16);
      return loaded<float>(bytes);
    }
    default:
      return static_cast<double>(loaded<_Float16>(from));
  }
}

Memory::Memory(std::int64_t bytes, int offset)
    : all_(new unsigned char[static_cast<std::size_t>(bytes + offset)]), bytes_(bytes), offset_(offset) {
  std::memset(all_.get(), kFiller, static_cast<std::size_t>(bytes + offset));
  expect(reinterpret_cast<std::uintptr_t>(all_.get()) % 16 == 0, "new aligns to 16 bytes");
}

bool Memory::intact() const {
  return std::all_of(all_.get(), all_.get() + offset_, [](unsigned char byte) { return byte == kFiller; });
}

Table::Table(int num_tasks_, int num_groups_, std::vector<Param> params_, const Reaches& reaches,
             const Value& value)
    : num_tasks(num_tasks_), num_groups(num_groups_), params(std::move(params_)) {
  for (const Param& param : params) {
    numels_.push_back(param.columns);
    dtypes_.push_back(param.dtype);
    groups_.push_back(param.group);
  }
  const std::size_t count = static_cast<std::size_t>(num_tasks) * params.size();
  pointers_.resize(count);
  memory_.resize(count);
  values_.resize(count);
  for (int k = 0; k < num_tasks; ++k) {
    for (std::size_t p = 0; p < params.size(); ++p) {
      if (!reaches(k, p)) continue;
      const Param& param = params[p];
      const bool moved = k % 3 == std::min(1, num_tasks - 1);
      const std::int64_t size = mtl::item_size(param.dtype);
      auto memory = std::make_unique<Memory>(param.columns * size, moved ? param.offset : 0);
      std::vector<double>& values = values_[at(k, p)];
      for (std::int64_t i = 0; i < param.columns; ++i) {
        values.push_back(quantized(param.dtype, value(k, p, i)));
        put(param.dtype, memory->begin() + i * size, values.back());
      }
      pointers_[at(k, p)] = memory->address();
      memory_[at(k, p)] = std::move(memory);
    }
  }
}

mtl::RowTable Table::rows() const {
  return {num_tasks,        static_cast<std::int64_t>(params.size()),
          pointers_.data(), numels_.data(),
          dtypes_.data(),   groups_.data()};
}

const double* Table::values(int k, std::size_t p) const {
  return values_[at(k, p)].empty() ? nullptr : values_[at(k, p)].data();
}

Table::Grams Table::grams() const {
  const auto K = static_cast<std::size_t>(num_tasks);
  Grams grams;
  grams.exact.resize(static_cast<std::size_t>(num_groups) * K * K);
  grams.absolute.resize(grams.exact.size());
  for (std::size_t p = 0; p < params.size(); ++p) {
    for (int i = 0; i < num_tasks; ++i) {
      for (int j = 0; j <= i; ++j) {
        const double *x = values(i, p), *y = values(j, p);
        if (x == nullptr || y == nullptr) continue;
        const std::int64_t columns = params[p].columns;
        long double exact = 0, absolute = 0;
        for (std::int64_t n = 0; n < columns; ++n) {
          const long double product = static_cast<long double>(x[n]) * y[n];
          exact += product;
          absolute += product < 0 ? -product : product;
        }
        const std::size_t first = static_cast<std::size_t>(params[p].group) * K * K;
        for (const std::size_t pair : {i * K + j, j * K + i}) {
          grams.exact[first + pair] += exact;
          grams.absolute[first + pair] += absolute;
          if (i == j) break;
        }
      }
    }
  }
  return grams;
}

Solution solve_on_host(const SolverCase& solver, int num_tasks, const double* gram,
                       const unsigned char* active, const std::int64_t* rng, std::int64_t index) {
  mtl::Problem problem{};
  problem.num_tasks = num_tasks;
  problem.gram = gram;
  problem.active = active;
  problem.rng = rng;
  problem.index = index;
  return solve_by_name(solver, problem, mtl::AllSolvers{});
}

void expect_same_solution(const SolverCase& solver, int num_tasks, const double* gram, const double* weights,
                          const double* certificate, const double* state, const Solution& host) {
  const double *by_host = host.weights.data(), *of_host = host.certificate.data();
  if (solver.name == std::string(mtl::Pcgrad::name) || std::isnan(of_host[0])) {
    expect(std::memcmp(weights, by_host, host.weights.size() * sizeof(double)) == 0,
           "the weights of the host");
    expect(
        std::isnan(of_host[0]) ? std::isnan(certificate[0]) : std::fabs(certificate[0] - of_host[0]) < 1e-15,
        "the gap of the host");
    expect(certificate[1] == of_host[1], "the iterations of the host");
    return;
  }
  expect(close(state, host.state.data(), host.state.size()), "the state of the host");
  if (solver.name != std::string(mtl::MinNorm::name)) {
    std::vector<double> off(host.weights);
    double longest = 0, largest = 1;  // of certificates without a unit, or in that of the Gram matrix
    for (int k = 0; k < num_tasks; ++k) {
      largest = std::max(largest, gram[k * num_tasks + k]);
      longest = std::max(longest, std::fabs(by_host[k]) * std::sqrt(gram[k * num_tasks + k]));
      off[k] -= weights[k];
    }
    // Of dependent rows other weights may be as right.
    expect(std::sqrt(std::max(squared_norm(num_tasks, gram, off.data()), 0.0)) <= 1e-6 * longest,
           "the direction of the host");
    expect(certificate[0] <= of_host[0] + 1e-9 * largest, "the residual");
    return;
  }
  double total = 0, largest = 0;
  const double norm = squared_norm(num_tasks, gram, weights), least = squared_norm(num_tasks, gram, by_host);
  for (int k = 0; k < num_tasks; ++k) {
    total += weights[k];
    if (by_host[k] != 0) largest = std::max(largest, gram[k * num_tasks + k]);
  }
  const bool cancels = least <= 1e-9 * largest;  // then rounding has a say in which rows do
  for (int k = 0; k < num_tasks; ++k)
    expect(weights[k] >= 0 && (cancels || by_host[k] != 0 || weights[k] < 1e-6), "weights on the simplex");
  double total_of_host = 0;
  for (const double weight : host.weights) total_of_host += weight;
  expect(std::fabs(total - total_of_host) < 1e-12, "the sum of the weights");
  expect(certificate[0] >= 0 && certificate[0] <= of_host[0] + 1e-9 * largest, "the gap");
  expect(std::fabs(norm - least) <= 1e-9 * largest, "the least norm");
}

}  // namespace test

int main(int argc, char** argv) {
  using namespace test;
  const struct {
    const char* name;
    std::function<void()> run;
  } cases[] = {
      {"plan", test_plan},
      {"errors", test_errors},
      {"gram_float32", [] { test_gram(DType::kFloat32); }},
      {"gram_slow_double", [] { on_slow_double([] { test_gram(DType::kFloat32); }); }},
      {"gram_float64", [] { test_gram(DType::kFloat64); }},
      {"gram_bfloat16", [] { test_gram(DType::kBFloat16); }},
      {"gram_float16", [] { test_gram(DType::kFloat16); }},
      {"gram_mixed", test_gram_mixed},
      {"range_float32", [] { test_gram_range(DType::kFloat32); }},
      {"range_slow_double", [] { on_slow_double([] { test_gram_range(DType::kFloat32); }); }},
      {"range_float64", [] { test_gram_range(DType::kFloat64); }},
      {"range_bfloat16", [] { test_gram_range(DType::kBFloat16); }},
      {"range_float16", [] { test_gram_range(DType::kFloat16); }},
      {"gram_solver", test_gram_solver},
      {"combine_float32", [] { test_combine(DType::kFloat32); }},
      {"combine_float64", [] { test_combine(DType::kFloat64); }},
      {"combine_bfloat16", [] { test_combine(DType::kBFloat16); }},
      {"combine_float16", [] { test_combine(DType::kFloat16); }},
      {"combine_mixed", test_combine_mixed},
      {"combine_slow_double",
       [] {
         on_slow_double([] {
           for (const DType rows : kDTypes) test_combine(rows);
           test_combine_mixed();
         });
       }},
      {"columns_float32", [] { test_columns(DType::kFloat32); }},
      {"columns_float64", [] { test_columns(DType::kFloat64); }},
      {"columns_bfloat16", [] { test_columns(DType::kBFloat16); }},
      {"columns_float16", [] { test_columns(DType::kFloat16); }},
      {"states_float32", [] { test_states(DType::kFloat32); }},
      {"states_float64", [] { test_states(DType::kFloat64); }},
      {"states_bfloat16", [] { test_states(DType::kBFloat16); }},
      {"states_float16", [] { test_states(DType::kFloat16); }},
      {"rounding", test_rounding},
      {"solve", test_solve},
  };
  int found = 0;
  for (const auto& item : cases) {
    if (argc > 1 &&
        std::none_of(argv + 1, argv + argc, [&](char* name) { return name == std::string(item.name); }))
      continue;
    ++found;
    context() = item.name;
    set_device(3, 2);
    item.run();
  }
  if (found < argc - 1) {
    std::puts("no such case");
    return 1;
  }
  std::puts("passed");
}
