// What the tests of csrc/cuda share: rows in heap blocks of exactly their bytes, values that every dtype
// holds exactly, and launches in several orders of blocks and threads.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "mtl_kernels/rows.h"
#include "mtl_kernels/solver.h"
#include "sanitizers.h"

namespace test {

using mtl::DType;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr bool kForRaces = EMULATION_TSAN != 0;  // slower, and blind to wrong numbers: fewer cases

std::string& context();  // printed with a failure
void expect(bool holds, const char* what);

// `call` throws an Error whose message holds `part`.
template <class Error, class Call>
void expect_error(const char* part, Call call) {
  try {
    call();
  } catch (const Error& error) {
    if (std::strstr(error.what(), part) == nullptr) {
      context() += error.what();
      expect(false, part);
    }
    return;
  }
  expect(false, part);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// What a device offers: blocks of a kernel at a time.
void set_device(int multiprocessors, int blocks_per_multiprocessor);

// Calls `launch` under two orders of blocks and threads, a random one and a straight one; when looking for
// races, which every order shows, under one.
void in_orders(const std::function<void()>& launch);

int draw(int n);      // 0 .. n - 1
double draw_exact();  // a multiple of 1/8 from -4 to 4: sums of few thousand products of them are exact
double draw_normal();

double quantized(DType dtype, double x);  // rounded to nearest, ties to even
void put(DType dtype, unsigned char* to, double quantized);
double get(DType dtype, const unsigned char* from);

// `bytes` at an address that is `offset` more than a multiple of 16. AddressSanitizer sees what goes beyond
// them, `intact` what goes before.
class Memory {
 public:
  Memory(std::int64_t bytes, int offset);
  unsigned char* begin() const { return all_.get() + offset_; }
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(begin()); }
  std::int64_t bytes() const { return bytes_; }
  bool intact() const;

 private:
  std::unique_ptr<unsigned char[]> all_;
  std::int64_t bytes_;
  int offset_;
};

struct Param {
  DType dtype;
  std::int64_t columns;
  int group = 0;
  int offset = 0;  // in bytes, of every third row from aligned memory
};

using Reaches = std::function<bool(int k, std::size_t p)>;
using Value = std::function<double(int k, std::size_t p, std::int64_t column)>;

inline bool all_reach(int, std::size_t) { return true; }
inline bool most_reach(int k, std::size_t p) { return (static_cast<std::size_t>(k) * 3 + p) % 5 != 2; }
inline double exact_value(int, std::size_t, std::int64_t) { return draw_exact(); }

// The rows of `num_tasks` tasks, and their values.
class Table {
 public:
  Table(int num_tasks, int num_groups, std::vector<Param> params, const Reaches& reaches = all_reach,
        const Value& value = exact_value);

  const int num_tasks, num_groups;
  const std::vector<Param> params;

  mtl::RowTable rows() const;
  const std::vector<std::uintptr_t>& pointers() const { return pointers_; }
  // nullptr where the task does not reach the parameter, or where it has no columns
  const double* values(int k, std::size_t p) const;
  Memory* memory(int k, std::size_t p) const { return memory_[at(k, p)].get(); }

  // The sums of products, and of their absolute values: [groups, K, K].
  struct Grams {
    std::vector<long double> exact, absolute;
  };
  Grams grams() const;

 private:
  std::size_t at(int k, std::size_t p) const { return static_cast<std::size_t>(k) * params.size() + p; }

  std::vector<std::int64_t> numels_;
  std::vector<DType> dtypes_;
  std::vector<std::int32_t> groups_;
  std::vector<std::uintptr_t> pointers_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<std::vector<double>> values_;
};

struct SolverCase {
  const char* name;
  std::vector<double> options;
  bool has_inputs = false;  // of each task; see input_of
};

inline double input_of(int task) { return 0.25 + task % 4; }

// What the solver headers answer on the host, from a state of zeros.
struct Solution {
  std::vector<double> weights, certificate, state;
};
Solution solve_on_host(const SolverCase& solver, int num_tasks, const double* gram,
                       const unsigned char* active, const std::int64_t* rng, std::int64_t index);
// The same bits, where a team adds up in one order whatever its size; else the same least norm, or direction.
void expect_same_solution(const SolverCase& solver, int num_tasks, const double* gram, const double* weights,
                          const double* certificate, const double* state, const Solution& host);

// The groups of cases; each is an argument of the program.
void test_plan();
void test_errors();
void test_gram(DType dtype);
void test_gram_mixed();
void test_gram_range(DType dtype);
void test_gram_solver();
void test_combine(DType rows);
void test_combine_mixed();
void test_columns(DType dtype);
void test_states(DType rows);
void test_rounding();
void test_solve();

}  // namespace test
