// Standalone checks of the solver headers; tests/native/test_solvers_native.py compiles this with the address
// and undefined behaviour sanitizers and runs it. By hand, from the repository root:
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -Icsrc/include tests/native/solvers_test.cpp -o /tmp/t
//   && /tmp/t
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "mtl_kernels/jacobi.h"
#include "mtl_kernels/solvers/all.h"

namespace {

using Matrix = std::vector<std::vector<double>>;

struct Result {
  std::vector<double> weights;
  double gap;
  int iterations;
  std::vector<double> state;
};

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

std::vector<double> gram_of(const Matrix& rows) {
  const std::size_t k = rows.size();
  std::vector<double> gram(k * k);
  for (std::size_t i = 0; i < k; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      long double total = 0;
      for (std::size_t n = 0; n < rows[i].size(); ++n)
        total += static_cast<long double>(rows[i][n]) * rows[j][n];
      gram[i * k + j] = gram[j * k + i] = static_cast<double>(total);
    }
  }
  return gram;
}

// A team of threads: what the team-style code of a solver means, before there is a GPU to run it.
class ThreadTeam {
 public:
  struct Shared {
    explicit Shared(int size) : slots(static_cast<std::size_t>(size)) {}
    std::mutex mutex;
    std::condition_variable arrived;
    int waiting = 0;
    int generation = 0;
    std::vector<mtl::IndexedValue> slots;
  };

  ThreadTeam(int rank, int size, Shared* shared) : rank_(rank), size_(size), shared_(shared) {}
  int rank() const { return rank_; }
  int size() const { return size_; }

  void sync() const {
    std::unique_lock<std::mutex> lock(shared_->mutex);
    const int generation = shared_->generation;
    if (++shared_->waiting == size_) {
      shared_->waiting = 0;
      ++shared_->generation;
      shared_->arrived.notify_all();
    } else {
      shared_->arrived.wait(lock, [&] { return shared_->generation != generation; });
    }
  }

  double sum(double x) const {
    double total = 0;
    for (const mtl::IndexedValue& slot : exchange({x, rank_})) total += slot.value;
    return total;
  }
  double min(double x) const {
    double least = x;
    for (const mtl::IndexedValue& slot : exchange({x, rank_})) least = std::min(least, slot.value);
    return least;
  }
  mtl::IndexedValue argmin(double value, int index) const {
    mtl::IndexedValue least{0.0, -1};
    for (const mtl::IndexedValue& slot : exchange({value, index})) least = mtl::lesser(least, slot);
    return least;
  }
  bool any(bool x) const { return sum(x) > 0; }

  static constexpr int kLanes = 1;  // every thread is a squad
  int squad() const { return rank_; }
  int num_squads() const { return size_; }
  int lane() const { return 0; }
  double from_lane(double x, int) const { return x; }
  unsigned least(unsigned x) const { return x; }
  mtl::SerialTeam as_team() const { return {}; }

 private:
  std::vector<mtl::IndexedValue> exchange(mtl::IndexedValue mine) const {
    shared_->slots[static_cast<std::size_t>(rank_)] = mine;
    sync();
    std::vector<mtl::IndexedValue> all = shared_->slots;
    sync();
    return all;
  }

  int rank_, size_;
  Shared* shared_;
};

// Scratch of exactly the declared size, so that the address sanitizer sees one double too many.
template <class Solver>
Result solve(const std::vector<double>& gram, const std::vector<double>& options,
             const std::vector<unsigned char>& active = {}, const std::int64_t* rng = nullptr,
             std::int64_t index = 0, int threads = 1, const std::vector<double>& state = {}) {
  const int k = static_cast<int>(std::lround(std::sqrt(static_cast<double>(gram.size()))));
  std::vector<double> scratch(Solver::scratch_doubles(k), std::numeric_limits<double>::quiet_NaN());
  std::vector<double> certificate(2);
  Result result{std::vector<double>(static_cast<std::size_t>(k), -1.0), 0.0, 0, state};
  result.state.resize(Solver::state_doubles(k));
  mtl::Problem p{};
  p.num_tasks = k;
  p.gram = gram.data();
  p.active = active.empty() ? nullptr : active.data();
  p.rng = rng;
  p.index = index;
  p.options = options.data();
  p.state = result.state.data();
  p.weights = result.weights.data();
  p.certificate = certificate.data();
  p.scratch = scratch.data();
  if (threads == 1) {
    Solver::solve(mtl::SerialTeam{}, p);
  } else {
    ThreadTeam::Shared shared(threads);
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; ++rank) {
      team.emplace_back([&, rank] { Solver::solve(ThreadTeam(rank, threads, &shared), p); });
    }
    for (std::thread& thread : team) thread.join();
  }
  result.gap = certificate[0];
  result.iterations = static_cast<int>(certificate[1]);
  return result;
}

Result min_norm(const std::vector<double>& gram) { return solve<mtl::MinNorm>(gram, {0.0, 0.0, 0.0}); }

// ||J'w||^2 from the rows themselves, so that a cancellation in G cannot hide.
long double objective(const Matrix& rows, const std::vector<double>& w) {
  long double total = 0;
  for (std::size_t n = 0; n < rows[0].size(); ++n) {
    long double d = 0;
    for (std::size_t k = 0; k < rows.size(); ++k) d += static_cast<long double>(w[k]) * rows[k][n];
    total += d * d;
  }
  return total;
}

long double longest(const Matrix& rows, const std::vector<double>& w) {
  long double total = 0;
  for (std::size_t k = 0; k < rows.size(); ++k) {
    long double squares = 0;
    for (double x : rows[k]) squares += static_cast<long double>(x) * x;
    total += w[k] * std::sqrt(squares);
  }
  return total;
}

// The least of w'Gw + 1e-13 (sum of w_k n_k)^2, the second term being what the rounding of G hides, by trying
// every support: the affine minimiser of each through Gaussian elimination in long double.
long double brute_force(const Matrix& rows) {
  const std::size_t k = rows.size();
  long double best = std::numeric_limits<long double>::infinity();
  for (unsigned mask = 1; mask < (1u << k); ++mask) {
    std::vector<std::size_t> s;
    for (std::size_t i = 0; i < k; ++i) {
      if (mask >> i & 1u) s.push_back(i);
    }
    const std::size_t m = s.size();
    std::vector<long double> norm(m);
    for (std::size_t i = 0; i < m; ++i) {
      long double squares = 0;
      for (double x : rows[s[i]]) squares += static_cast<long double>(x) * x;
      norm[i] = std::sqrt(squares);
      if (norm[i] == 0) return 0;
    }
    long double least = norm[0];
    for (long double x : norm) least = std::min(least, x);
    std::vector<std::vector<long double>> a(m, std::vector<long double>(m + 1));
    for (std::size_t i = 0; i < m; ++i) {
      for (std::size_t j = 0; j < m; ++j) {
        long double dot = 0;
        for (std::size_t n = 0; n < rows[0].size(); ++n) {
          dot += (rows[s[i]][n] / norm[i]) * (rows[s[j]][n] / norm[j]);
        }
        a[i][j] = dot + (least / norm[i]) * (least / norm[j]);
      }
      a[i][m] = least / norm[i];
    }
    bool singular = false;
    for (std::size_t c = 0; c < m && !singular; ++c) {
      std::size_t pivot = c;
      for (std::size_t r = c; r < m; ++r) {
        if (std::fabs(a[r][c]) > std::fabs(a[pivot][c])) pivot = r;
      }
      std::swap(a[c], a[pivot]);
      if (std::fabs(a[c][c]) < 1e-18L) singular = true;
      for (std::size_t r = 0; r < m && !singular; ++r) {
        if (r == c) continue;
        const long double f = a[r][c] / a[c][c];
        for (std::size_t q = c; q <= m; ++q) a[r][q] -= f * a[c][q];
      }
    }
    if (singular) continue;
    std::vector<double> w(k, 0.0);
    long double total = 0;
    bool inside = true;
    for (std::size_t i = 0; i < m; ++i) {
      const long double u = a[i][m] / a[i][i] / norm[i];
      inside = inside && u >= 0;
      total += u;
    }
    if (!inside) continue;
    for (std::size_t i = 0; i < m; ++i) w[s[i]] = static_cast<double>(a[i][m] / a[i][i] / norm[i] / total);
    const long double unit = longest(rows, w);
    best = std::min(best, objective(rows, w) + 1e-13L * unit * unit);
  }
  return best;
}

// Random rows of a chosen rank; then, by kind: plain, near-parallel, with copies, anti-parallel, norms spread
// widely, a grid, a grid with norms spread widely.
Matrix random_rows(std::mt19937& engine, std::size_t k, std::size_t n, int kind) {
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<std::size_t> pick(0, k - 1);
  std::uniform_int_distribution<int> small(-2, 2);
  std::uniform_real_distribution<double> exponent(-15, 15);
  Matrix rows(k, std::vector<double>(n));
  const std::vector<double> common = [&] {
    std::vector<double> v(n);
    for (double& x : v) x = normal(engine);
    return v;
  }();
  for (std::vector<double>& row : rows) {
    for (std::size_t c = 0; c < n; ++c) {
      row[c] = kind >= 5 ? small(engine) : kind == 1 ? common[c] + 1e-5 * normal(engine) : normal(engine);
    }
  }
  if (kind == 2) rows[pick(engine)] = rows[pick(engine)];
  if (kind == 3) {
    const std::size_t from = pick(engine);
    const std::size_t to = pick(engine);
    if (from != to) {
      for (std::size_t c = 0; c < n; ++c) rows[to][c] = -rows[from][c];
    }
  }
  if (kind == 4 || kind == 6) {
    for (std::vector<double>& row : rows) {
      const double scale = kind == 4 ? std::pow(10.0, exponent(engine))
                                     : std::ldexp(1.0, static_cast<int>(3 * exponent(engine)));
      for (double& x : row) x *= scale;
    }
  }
  return rows;
}

void normalize(std::vector<double>& row) {
  double squares = 0;
  for (double x : row) squares += x * x;
  for (double& x : row) x /= std::sqrt(squares);
}

// Unit rows of which every `size` add up to little, `least` to `most` of a row.
Matrix nearly_cancelling(std::mt19937& engine, std::size_t k, std::size_t size, double least, double most) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> share(0.2, 2), exponent(std::log10(least), std::log10(most));
  Matrix rows(k, std::vector<double>(2 + engine() % (2 * k)));
  for (std::size_t i = 0; i < k; ++i) {
    for (double& x : rows[i]) x = normal(engine);
    normalize(rows[i]);
    if (i % size != size - 1) continue;
    const double left = std::pow(10.0, exponent(engine));
    for (double& x : rows[i]) x *= left;
    for (std::size_t j = i + 1 - size; j < i; ++j) {
      const double part = size == 2 ? 1 : share(engine);
      for (std::size_t c = 0; c < rows[i].size(); ++c) rows[i][c] -= part * rows[j][c];
    }
    normalize(rows[i]);
  }
  return rows;
}

// The certificate by its definition, from the matrix as it is.
long double gap_of(const std::vector<double>& gram, const std::vector<double>& w) {
  const std::size_t k = w.size();
  long double total = 0, value = 0, least = std::numeric_limits<long double>::infinity();
  for (double x : w) total += x;
  for (std::size_t i = 0; i < k; ++i) {
    long double product = 0;
    for (std::size_t j = 0; j < k; ++j) product += static_cast<long double>(gram[i * k + j]) * (w[j] / total);
    value += w[i] / total * product;
    least = std::min(least, product);
  }
  return value - least;
}

void test_philox() {
  const mtl::Philox4 zero = mtl::philox4x32_10({{0, 0, 0, 0}}, 0, 0);
  CHECK(zero.word[0] == 0x6627e8d5u && zero.word[1] == 0xe169c58du && zero.word[2] == 0xbc57ac4cu &&
            zero.word[3] == 0x9b00dbd8u,
        "first word %08x", zero.word[0]);
  const mtl::Philox4 pi =
      mtl::philox4x32_10({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u);
  CHECK(pi.word[0] == 0xd16cfe09u && pi.word[1] == 0x94fdccebu && pi.word[2] == 0x5001e420u &&
            pi.word[3] == 0x24126ea1u,
        "first word %08x", pi.word[0]);
}

void test_min_norm_against_brute_force() {
  std::mt19937 engine(7);
  int worst_iterations = 0;
  for (int trial = 0; trial < 10000; ++trial) {
    const std::size_t k = 1 + engine() % 5;
    const std::size_t n = 1 + engine() % 6;
    const int kind = static_cast<int>(engine() % 7);
    const Matrix rows = random_rows(engine, k, n, kind);
    const Result found = min_norm(gram_of(rows));
    double total = 0;
    for (double w : found.weights) {
      CHECK(w >= 0, "trial %d kind %d weight %g", trial, kind, w);
      total += w;
    }
    CHECK(std::fabs(total - 1) < 1e-14, "trial %d kind %d: weights sum to %.17g", trial, kind, total);
    const long double value = objective(rows, found.weights);
    const long double optimum = brute_force(rows);
    const long double unit = longest(rows, found.weights);
    CHECK(value <= optimum * (1 + 1e-9L) + 1e-13L * unit * unit,
          "trial %d kind %d K %zu N %zu: %Lg, optimum %Lg, rounding unit %Lg", trial, kind, k, n, value,
          optimum, unit * unit);
    worst_iterations = std::max(worst_iterations, found.iterations);
  }
  CHECK(worst_iterations <= 20, "%d iterations", worst_iterations);
}

void test_min_norm_large() {
  std::mt19937 engine(11);
  for (int trial = 0; trial < 100; ++trial) {
    const std::size_t k = 6 + engine() % 123;
    const std::size_t n = 1 + engine() % (2 * k);
    const int kind = static_cast<int>(engine() % 7);
    const Matrix rows = random_rows(engine, k, n, kind);
    const std::vector<double> gram = gram_of(rows);
    const Result found = min_norm(gram);
    // The certificate against its definition, and small against the rounding of each product.
    const long double unit = longest(rows, found.weights);
    double largest = 0;
    for (std::size_t i = 0; i < k; ++i) largest = std::max(largest, std::sqrt(gram[i * k + i]));
    const double bound = 1e-12 * static_cast<double>(unit * (unit + largest));
    CHECK(found.gap <= bound, "trial %d kind %d K %zu N %zu: gap %g, bound %g, %d iterations", trial, kind, k,
          n, found.gap, bound, found.iterations);
    CHECK(found.iterations < static_cast<int>(4 * k), "trial %d kind %d K %zu: %d iterations", trial, kind, k,
          found.iterations);
  }
}

void test_min_norm_on_rows_that_nearly_cancel() {
  std::mt19937 engine(17);
  for (int trial = 0; trial < 1500; ++trial) {
    const std::size_t k = trial % 100 == 0 ? 128 : 4 + engine() % 36;
    const double left = std::pow(10.0, -3.0 - static_cast<double>(engine() % 7));
    const Matrix rows =
        nearly_cancelling(engine, k, 2 + engine() % 2, left, trial % 3 == 0 ? 1e-3 : 1.01 * left);
    const std::vector<double> gram = gram_of(rows);
    const Result found = min_norm(gram);
    const long double gap = gap_of(gram, found.weights);
    CHECK(gap <= 1e-15L * k, "trial %d K %zu: gap %Lg", trial, k, gap);
    CHECK(std::fabs(found.gap - gap) <= 1e-15L, "trial %d K %zu: %g, found %Lg", trial, k, found.gap, gap);
    CHECK(found.iterations < static_cast<int>(5 * k), "trial %d K %zu: %d iterations", trial, k,
          found.iterations);
  }
}

void test_min_norm_degenerate() {
  const double big = 1e300;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  Result r = min_norm({4.0});
  CHECK(r.weights[0] == 1 && r.gap == 0, "K = 1");
  r = min_norm({1, 0, 0, 0, 0, 0, 0, 0, 4});
  CHECK(r.weights[1] == 1 && r.gap == 0, "a zero row");
  r = min_norm({1, -1, -1, 1});
  CHECK(r.weights[0] == 0.5 && r.weights[1] == 0.5 && r.gap == 0, "anti-parallel: %g", r.weights[0]);
  r = min_norm({1, 0, 0, 0, 1e18, -1e18, 0, -1e18, 1e18});
  CHECK(std::fabs(r.weights[1] - 0.5) < 1e-15 && r.weights[0] == 0, "long anti-parallel rows: %g %g",
        r.weights[0], r.weights[1]);
  r = min_norm({big, -big, -big, big});
  CHECK(r.weights[0] == 0.5, "large: %g", r.weights[0]);
  r = min_norm({5e-324, 0, 0, 5e-324});
  CHECK(std::fabs(r.weights[0] - 0.5) < 1e-12, "subnormal: %g", r.weights[0]);
  r = min_norm({1, nan, nan, 1});
  CHECK(r.weights[0] == 0.5 && r.weights[1] == 0.5 && std::isnan(r.gap) && r.iterations == 0, "nan");
  r = min_norm({inf, 0, 0, 1});
  CHECK(r.weights[0] == 0.5 && std::isnan(r.gap), "inf");
  r = solve<mtl::MinNorm>({nan, nan, nan, 1}, {0, 0, 0}, {0, 1});
  CHECK(r.weights[0] == 0 && r.weights[1] == 1 && r.gap == 0, "nan in an inactive row");
  r = solve<mtl::MinNorm>({1, 0, 0, 1}, {0, 0, 0}, {0, 0});
  CHECK(r.weights[0] == 0 && r.weights[1] == 0 && r.gap == 0, "no active task");
  r = min_norm({1, 2, 2, 1});
  CHECK(r.weights[0] + r.weights[1] == 1, "an indefinite matrix");
  r = min_norm({-1, 0, 0, 1});
  CHECK(r.weights[0] == 1, "a negative diagonal");
}

void test_frank_wolfe() {
  std::mt19937 engine(5);
  for (int trial = 0; trial < 300; ++trial) {
    const std::size_t k = 2 + engine() % 20;
    const Matrix rows = random_rows(engine, k, 2 * k, 0);
    const std::vector<double> gram = gram_of(rows);
    const Result found = solve<mtl::MinNorm>(gram, {1.0, 5000.0, 1e-2});
    double largest = 0;
    for (std::size_t i = 0; i < k; ++i) largest = std::max(largest, gram[i * k + i]);
    CHECK(found.gap <= 1e-2 * largest * (1 + 1e-9), "trial %d: gap %g", trial, found.gap);
    const auto optimum = objective(rows, min_norm(gram).weights);
    CHECK(objective(rows, found.weights) - optimum <= 2 * found.gap * (1 + 1e-9) + 1e-12,
          "trial %d: twice the gap is no bound", trial);
  }
}

// PCGrad by its definition, on vectors.
std::vector<double> pcgrad_direction(const Matrix& rows, const std::vector<std::vector<int>>& order) {
  std::vector<double> d(rows[0].size(), 0.0);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::vector<double> g = rows[i];
    for (int j : order[i]) {
      const std::vector<double>& other = rows[static_cast<std::size_t>(j)];
      double dot = 0;
      double squares = 0;
      for (std::size_t n = 0; n < g.size(); ++n) {
        dot += g[n] * other[n];
        squares += other[n] * other[n];
      }
      if (!(dot < 0 && squares > 0)) continue;
      for (std::size_t n = 0; n < g.size(); ++n) g[n] -= dot / squares * other[n];
    }
    for (std::size_t n = 0; n < g.size(); ++n) d[n] += g[n];
  }
  return d;
}

void test_pcgrad() {
  std::mt19937 engine(3);
  for (int trial = 0; trial < 1000; ++trial) {
    const std::size_t k = 1 + engine() % 12;
    const std::size_t n = k + engine() % 8;
    const Matrix rows = random_rows(engine, k, n, 0);
    const std::int64_t rng[2] = {static_cast<std::int64_t>(engine()) * 77777777,
                                 static_cast<std::int64_t>(engine())};
    const std::int64_t index = engine() % 5;
    const Result found = solve<mtl::Pcgrad>(gram_of(rows), {1.0, 0.0}, {}, rng, index);
    std::vector<std::vector<int>> order(k);
    for (std::size_t i = 0; i < k; ++i) {
      std::vector<std::pair<std::uint32_t, int>> keys;
      for (std::size_t j = 0; j < k; ++j) {
        const mtl::Philox4 words = mtl::philox_at(rng, static_cast<std::uint32_t>(index),
                                                  static_cast<std::uint32_t>(i * 32 + j / 4));
        if (j != i)
          keys.push_back({(words.word[j % 4] & ~127u) | static_cast<std::uint32_t>(j), static_cast<int>(j)});
      }
      for (std::size_t a = 0; a < keys.size(); ++a) {
        for (std::size_t b = a + 1; b < keys.size(); ++b) {
          if (keys[b].first < keys[a].first) std::swap(keys[a], keys[b]);
        }
      }
      for (const auto& key : keys) order[i].push_back(key.second);
    }
    const std::vector<double> expected = pcgrad_direction(rows, order);
    for (std::size_t c = 0; c < n; ++c) {
      double d = 0;
      for (std::size_t i = 0; i < k; ++i) d += found.weights[i] * rows[i][c];
      CHECK(std::fabs(d - expected[c]) < 1e-9, "trial %d K %zu: %g, expected %g", trial, k, d, expected[c]);
    }
  }
  std::vector<double> big(128 * 128);
  for (std::size_t i = 0; i < 128; ++i) {
    for (std::size_t j = 0; j < 128; ++j) big[i * 128 + j] = i == j ? 1.0 : -0.005;
  }
  const std::int64_t rng[2] = {1, 2};
  const Result found = solve<mtl::Pcgrad>(big, {1.0, 1.0}, {}, rng);
  CHECK(128 * found.weights[0] > 1.0 && 128 * found.weights[127] > 1.0, "K = 128: %g", found.weights[0]);
}

// The nearest point of the simplex by its definition: x minus what makes the positive part add up to 1.
std::vector<double> project(std::vector<double> x) {
  long double low = *std::max_element(x.begin(), x.end()) - 1.0L, high = low + 1;
  for (int halving = 0; halving < 200; ++halving) {
    const long double middle = (low + high) / 2;
    long double total = 0;
    for (double value : x) total += std::max(value - middle, 0.0L);
    (total > 1 ? low : high) = middle;
  }
  for (double& value : x) value = static_cast<double>(std::max(value - high, 0.0L));
  return x;
}

void test_stochastic() {
  std::mt19937 engine(19);
  const std::vector<double> published{0.3, 10, 0.5, 20, 1};
  for (int trial = 0; trial < 300; ++trial) {
    const std::size_t k = trial % 50 == 0 ? 128 : 1 + engine() % 12;
    const Matrix first = random_rows(engine, k, 1 + engine() % (2 * k), static_cast<int>(engine() % 4));
    Matrix rows = first;
    for (const std::vector<double>& row : random_rows(engine, k, first[0].size(), 0)) rows.push_back(row);
    const std::vector<double> both = gram_of(rows);
    std::vector<double> products(k * k);
    for (std::size_t i = 0; i < k; ++i)
      for (std::size_t j = 0; j < k; ++j)
        products[i * k + j] = both[i * 2 * k + j] + both[i * 2 * k + k + j];  // not symmetric
    std::vector<double> w(k, 1.0 / static_cast<double>(k)), x(k);
    std::vector<double> state;
    for (int step = 0; step < 3; ++step) {
      const Result found = solve<mtl::Modo>(products, {0.1, 0.2}, {}, nullptr, 0, 1, state);
      double longest = 1;
      for (std::size_t i = 0; i < k; ++i) {
        long double product = 0;
        for (std::size_t j = 0; j < k; ++j) product += static_cast<long double>(products[i * k + j]) * w[j];
        x[i] = static_cast<double>(w[i] - 0.1L * (product + 0.2L * w[i]));
        longest = std::max(longest, std::fabs(x[i]));
      }
      const std::vector<double> expected = project(x);
      for (std::size_t i = 0; i < k; ++i) {
        CHECK(std::fabs(found.weights[i] - expected[i]) <= 1e-14 * longest, "trial %d K %zu: %g, expected %g",
              trial, k, found.weights[i], expected[i]);
        CHECK(found.state[i] == found.weights[i], "trial %d: the state is the weights", trial);
      }
      w = state = found.state;
    }
    std::vector<unsigned char> active(k, 1);
    if (trial % 3 == 0) active[engine() % k] = 0;
    const Result alone = solve<mtl::Sdmgrad>(products, published, active, nullptr, 0, 1, state);
    double total = 0, kept = 0;
    for (std::size_t i = 0; i < k; ++i) {
      CHECK(alone.weights[i] >= 0 && (active[i] != 0 || alone.weights[i] == 0), "trial %d", trial);
      CHECK(active[i] != 0 || alone.state[i] == state[i], "trial %d: a task that is away", trial);
      total += alone.weights[i];
      kept += alone.state[i];
    }
    if (std::count(active.begin(), active.end(), 1) == 0) continue;
    CHECK(std::fabs(total - 1) < 1e-13, "trial %d: weights sum to %.17g", trial, total);
    CHECK(kept > 0.99, "trial %d: the state sums to %.17g", trial, kept);
    if (trial % 5 != 0) continue;
    // Long steps carry a difference of one bit through the whole simplex.
    const Result team = solve<mtl::Sdmgrad>(products, published, active, nullptr, 0, 2 + trial % 4, state);
    CHECK(team.weights == alone.weights && team.state == alone.state, "trial %d: other bits from a team",
          trial);
  }
}

// GradVac by its definition on vectors, in ascending order: the direction, and the targets after the step.
std::vector<double> gradvac_direction(const Matrix& rows, double beta, std::vector<double>* targets) {
  const std::size_t k = rows.size(), n = rows[0].size();
  const auto dot = [n](const std::vector<double>& a, const std::vector<double>& b) {
    double total = 0;
    for (std::size_t col = 0; col < n; ++col) total += a[col] * b[col];
    return total;
  };
  std::vector<double> d(n, 0.0);
  for (std::size_t i = 0; i < k; ++i) {
    std::vector<double> g = rows[i];
    for (std::size_t j = 0; j < k; ++j) {
      if (j == i) continue;
      const double length = std::sqrt(dot(g, g)), other = std::sqrt(dot(rows[j], rows[j]));
      const double c = dot(g, rows[j]) / (length * other);
      double& r = (*targets)[i * k + j];
      if (c < r) {
        const double more =
            length * (r * std::sqrt(1 - c * c) - c * std::sqrt(1 - r * r)) / (other * std::sqrt(1 - r * r));
        for (std::size_t col = 0; col < n; ++col) g[col] += more * rows[j][col];
      }
      r = (1 - beta) * r + beta * c;
    }
    for (std::size_t col = 0; col < n; ++col) d[col] += g[col];
  }
  return d;
}

void test_gradvac() {
  std::mt19937 engine(29);
  for (int trial = 0; trial < 250; ++trial) {
    const std::size_t k = trial % 100 == 0 ? 128 : 1 + engine() % 12;
    const std::size_t n = k + 4 + engine() % 8;
    std::vector<double> targets(k * k, 0.1), state = targets;
    for (int step = 0; step < 3; ++step) {
      const Matrix rows = random_rows(engine, k, n, 0);
      const Result found = solve<mtl::Gradvac>(gram_of(rows), {0.0, 0.0, 0.3}, {}, nullptr, 0, 1, state);
      const std::vector<double> expected = gradvac_direction(rows, 0.3, &targets);
      state = found.state;
      for (std::size_t c = 0; c < n; ++c) {
        double d = 0;
        for (std::size_t i = 0; i < k; ++i) d += found.weights[i] * rows[i][c];
        CHECK(std::fabs(d - expected[c]) < 1e-9 * (1 + std::fabs(expected[c])),
              "trial %d K %zu: %g, expected %g", trial, k, d, expected[c]);
      }
      for (std::size_t i = 0; i < k * k; ++i)
        CHECK(std::fabs(state[i] - targets[i]) < 1e-9, "trial %d K %zu: target %g, expected %g", trial, k,
              state[i], targets[i]);
    }
  }
}

// F(w) = g_w'g0 + c |g0| |g_w| of CAGrad, g_w = J'w, and the least g_i'd of a d on the way from g0 along g_w.
std::pair<long double, long double> cagrad_bounds(const Matrix& rows, const std::vector<double>& w,
                                                  double c) {
  const std::size_t k = rows.size(), n = rows[0].size();
  std::vector<long double> mean(n), g(n);
  long double product = 0, mean_square = 0, square = 0, total = 0;
  for (double x : w) total += x;
  for (std::size_t col = 0; col < n; ++col) {
    for (std::size_t i = 0; i < k; ++i) {
      mean[col] += static_cast<long double>(rows[i][col]) / k;
      g[col] += rows[i][col] * (w[i] / total);
    }
    product += mean[col] * g[col];
    mean_square += mean[col] * mean[col];
    square += g[col] * g[col];
  }
  const long double reach = c * std::sqrt(mean_square);
  long double least = std::numeric_limits<long double>::infinity();
  for (std::size_t i = 0; i < k; ++i) {
    long double gain = 0;
    for (std::size_t col = 0; col < n; ++col)
      gain += rows[i][col] * (mean[col] + reach * g[col] / std::sqrt(square));
    least = std::min(least, gain);
  }
  return {product + reach * std::sqrt(square), least};
}

void test_cagrad() {
  std::mt19937 engine(23);
  int zeros = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const std::size_t k = trial % 200 == 0 ? 128 : 1 + engine() % 20;
    const int kind = static_cast<int>(engine() % 7);
    const Matrix rows = random_rows(engine, k, 1 + engine() % (2 * k), kind);
    const std::vector<double> gram = gram_of(rows);
    const double c = trial % 3 == 0 ? 0.4 : trial % 3 == 1 ? 0.05 : 3.0;
    const Result found = solve<mtl::Cagrad>(gram, {c, 0, 0});
    const Result rescaled = solve<mtl::Cagrad>(gram, {c, 1, 1});
    double largest = 0;
    for (std::size_t i = 0; i < k; ++i) {
      largest = std::max(largest, gram[i * k + i]);
      CHECK(
          std::fabs(rescaled.weights[i] * (1 + c * c) - k * found.weights[i]) <= 1e-14 * k * found.weights[i],
          "trial %d: rescaled", trial);
    }
    CHECK(found.iterations <= 5 * static_cast<int>(k), "trial %d K %zu: %d iterations", trial, k,
          found.iterations);
    if (std::count(found.weights.begin(), found.weights.end(), 0.0) == static_cast<int>(k)) {
      ++zeros;
      CHECK(found.gap <= 1e-12 * largest, "trial %d kind %d K %zu: gap %g at 0", trial, kind, k, found.gap);
      if (c < 1) continue;
      const std::vector<double> w = min_norm(gram).weights;  // from c = 1 on 0 is for stationary rows alone
      const long double unit = longest(rows, w);
      CHECK(objective(rows, w) <= 1e-14L * (k + 10) * unit * unit, "trial %d kind %d K %zu: not stationary",
            trial, kind, k);
      continue;
    }
    std::vector<double> w(found.weights);
    for (double& x : w) x = std::max(x - 1.0 / static_cast<double>(k), 0.0);
    const long double unit = longest(rows, w);
    const double left = static_cast<double>(std::sqrt(objective(rows, w)) / unit);
    const auto [value, least] = cagrad_bounds(rows, w, c);
    const double bound = 1e-13 * (1 + c) * static_cast<double>(k) / left * largest;
    CHECK(found.gap <= bound, "trial %d kind %d K %zu: gap %g, bound %g", trial, kind, k, found.gap, bound);
    CHECK(value - least <= bound, "trial %d kind %d K %zu: %Lg, bound %g", trial, kind, k, value - least,
          bound);
  }
  CHECK(zeros > 400 && zeros < 2000, "%d of 4000 are stationary", zeros);
}

// A factor that a row is taken out of is that of the matrix without it.
void test_removal() {
  std::mt19937 engine(23);
  for (int trial = 0; trial < 300; ++trial) {
    const int n = 1 + static_cast<int>(engine() % 12);
    const int gone = static_cast<int>(engine() % 12) % n;
    const std::vector<double> gram =
        gram_of(random_rows(engine, static_cast<std::size_t>(n), static_cast<std::size_t>(2 * n), 0));
    std::vector<double> whole(mtl::PackedCholesky::doubles(n)), column(static_cast<std::size_t>(n));
    const mtl::PackedCholesky factor{whole.data(), n};
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < j; ++i)
        column[static_cast<std::size_t>(i)] = gram[static_cast<std::size_t>(i * n + j)];
      factor.append(mtl::SerialTeam{}, j, column.data(), gram[static_cast<std::size_t>(j * n + j)], 0.0);
    }
    factor.remove(mtl::SerialTeam{}, n, gone, column.data());
    for (int i = 0; i < n - 1; ++i) {
      for (int j = i; j < n - 1; ++j) {
        double product = 0;
        for (int k = 0; k <= i; ++k) product += factor.at(k)[i] * factor.at(k)[j];
        const double expected = gram[static_cast<std::size_t>((i + (i >= gone)) * n + j + (j >= gone))];
        CHECK(std::fabs(product - expected) < 1e-12, "trial %d: (%d, %d) of %d without %d: %g, expected %g",
              trial, i, j, n, gone, product, expected);
      }
    }
  }
}

// How far DualProj's conditions are from being met, from the matrix as it is; no lower than the rounding of
// w.
long double dual_cone_violation(const std::vector<double>& gram, const std::vector<double>& w, double pref,
                                double reg) {
  const std::size_t k = w.size();
  long double trace = 0, unit = 0, longest = 0, worst = 0;
  for (std::size_t i = 0; i < k; ++i) trace += gram[i * k + i];
  const auto norm = [&](std::size_t i) { return std::sqrt(gram[i * k + i] + reg * trace); };
  for (std::size_t i = 0; i < k; ++i) {
    if (gram[i * k + i] > 0) unit += pref * norm(i), longest += w[i] * norm(i);
  }
  if (unit == 0) return 0;
  for (std::size_t i = 0; i < k; ++i) {
    if (!(gram[i * k + i] > 0)) continue;
    long double product = reg * trace * w[i];
    for (std::size_t j = 0; j < k; ++j) product += static_cast<long double>(gram[i * k + j]) * w[j];
    product /= norm(i);
    worst = std::max(worst, w[i] > pref * (1 + 1e-15) ? std::fabs(product) : -product);
  }
  return worst / longest;
}

void test_dual_cone() {
  std::mt19937 engine(29);
  for (int trial = 0; trial < 3000; ++trial) {
    const std::size_t k = trial % 100 == 0 ? 60 + engine() % 69 : 1 + engine() % 12;
    const int kind = static_cast<int>(engine() % 7);
    const Matrix rows = random_rows(engine, k, 1 + engine() % (2 * k), kind);
    const std::vector<double> gram = gram_of(rows);
    const double reg = trial % 2 == 0 ? 0 : 1e-4;
    const Result found = solve<mtl::Dualproj>(gram, {reg});
    for (double w : found.weights) CHECK(w >= 1.0 / k, "trial %d: a weight of %g", trial, w);
    const long double violation = dual_cone_violation(gram, found.weights, 1.0 / k, reg);
    CHECK(violation <= 1e-15L * k, "trial %d kind %d K %zu reg %g: %Lg", trial, kind, k, reg, violation);
    CHECK(found.iterations <= static_cast<int>(2 * k), "trial %d: %d iterations", trial, found.iterations);
    if (k > 12) continue;
    const Result sum = solve<mtl::Upgrad>(gram, {1e-4});
    CHECK(sum.gap <= 1e-14 * k, "trial %d kind %d K %zu: gap %g", trial, kind, k, sum.gap);
  }
}

// The conditions of PCD in its first step, where all a_k are unit rows: with w_1 = c / n_1, (Gw)_j / n_j is
// at least c tau, and that where w_j > 0. Or 0 in the hull of the others.
void test_pcd() {
  std::mt19937 engine(31);
  int alone = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const std::size_t k = trial % 100 == 0 ? 60 + engine() % 69 : 1 + engine() % 12;
    const Matrix rows = random_rows(engine, k, 1 + engine() % (2 * k), trial % 2 == 0 ? 0 : 2);
    const std::vector<double> gram = gram_of(rows);
    const Result found = solve<mtl::Pcd>(gram, {0.1, 0.9, 0.0});
    if (found.weights[0] == 1 && std::count(found.weights.begin() + 1, found.weights.end(), 0.0) + 1 ==
                                     static_cast<std::ptrdiff_t>(k)) {
      ++alone;
      CHECK(found.gap <= 1e-14 * k, "trial %d K %zu: %g", trial, k, found.gap);
      continue;
    }
    long double longest = 0, square = 0;
    for (std::size_t i = 0; i < k; ++i) longest += found.weights[i] * std::sqrt(gram[i * k + i]);
    const long double c = found.weights[0] * std::sqrt(gram[0]);
    for (std::size_t i = 0; i < k; ++i) {
      long double product = 0;
      for (std::size_t j = 0; j < k; ++j)
        product += static_cast<long double>(gram[i * k + j]) * found.weights[j];
      square += found.weights[i] * product;
      const long double over = product / std::sqrt(gram[i * k + i]) - 0.1L * c;
      CHECK(i == 0 || (found.weights[i] > 0 ? std::fabs(over) : -over) <= 1e-15L * k * longest,
            "trial %d K %zu: condition %zu off by %Lg of %Lg", trial, k, i, over, longest);
    }
    CHECK(std::fabs(square - gram[0]) <= 1e-14L * k * longest * longest, "trial %d: length %Lg", trial,
          square);
  }
  CHECK(alone > 300 && alone < 2000, "%d without an answer", alone);
}

template <class Solver>
void check_degenerate_cones(double reg) {
  const char* name = Solver::name;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Result r = solve<Solver>({4.0}, {reg});
  CHECK(r.weights[0] == 1 && r.gap == 0, "%s: K = 1", name);
  r = solve<Solver>({0, 0, 0, 0}, {reg});
  CHECK(r.weights[0] == 0.5 && r.weights[1] == 0.5 && r.gap == 0, "%s: no rows", name);
  r = solve<Solver>({1, -1, -1, 1}, {reg});
  CHECK(std::fabs(r.weights[0] - r.weights[1]) < 1e-10, "%s: opposite", name);
  r = solve<Solver>({1e300, -1e300, -1e300, 2e300}, {reg});
  CHECK(r.weights[0] >= 0.5 && r.gap < 1e-15, "%s: large", name);
  r = solve<Solver>({5e-324, 0, 0, 5e-324}, {reg});
  CHECK(r.weights[0] == 0.5 && r.gap < 1e-15, "%s: subnormal", name);
  r = solve<Solver>({1, nan, nan, 1}, {reg});
  CHECK(r.weights[0] == 0.5 && std::isnan(r.gap), "%s: nan", name);
  r = solve<Solver>({nan, nan, nan, 1}, {reg}, {0, 1});
  CHECK(r.weights[0] == 0 && r.weights[1] == 1 && r.gap == 0, "%s: nan in an inactive row", name);
  r = solve<Solver>({1, 2, 2, 1}, {reg});
  CHECK(r.weights[0] == 0.5, "%s: an indefinite matrix", name);
  r = solve<Solver>({1, -2, -2, 1}, {reg});
  CHECK(std::isfinite(r.weights[0]), "%s: an indefinite matrix", name);
  r = solve<Solver>({-1, -3, -3, 1}, {reg});
  CHECK(std::isfinite(r.weights[0]), "%s: a negative diagonal", name);
}

void test_dual_cone_degenerate() {
  for (double reg : {0.0, 1e-4}) {
    check_degenerate_cones<mtl::Upgrad>(reg);
    check_degenerate_cones<mtl::Dualproj>(reg);
  }
}

// Weights that are unique, of one thread and of a few.
template <class Solver>
void check_team(const std::vector<double>& gram, const std::vector<double>& options,
                const std::vector<unsigned char>& active, int threads) {
  const Result alone = solve<Solver>(gram, options, active);
  const Result together = solve<Solver>(gram, options, active, nullptr, 0, threads);
  for (std::size_t i = 0; i < alone.weights.size(); ++i) {
    const double off = alone.weights[i] - together.weights[i];
    CHECK(std::fabs(off) <= 1e-9 * (1 + alone.weights[i]), "%s: %d threads: %g", Solver::name, threads, off);
  }
}

// V S V' is A and V'V = 1, as far as the rounding of the rotations allows. Rows of graded lengths have small
// eigenvalues that are far below the rounding of the large ones, and as accurate: their inverse adds up the
// lengths.
void test_jacobi() {
  using Jacobi = mtl::Jacobi<mtl::SerialTeam>;
  std::mt19937 engine(19);
  int most = 0;
  for (int trial = 0; trial < 1500; ++trial) {
    const std::size_t k = trial % 300 == 0 ? 128 : 1 + engine() % 40;
    const int kind = static_cast<int>(engine() % 7);
    Matrix rows = random_rows(engine, k, 1 + engine() % (2 * k), kind);
    std::vector<double> gram = gram_of(rows);
    double largest = 0;
    for (std::size_t i = 0; i < k; ++i) largest = std::max(largest, gram[i * k + i]);
    std::vector<double> scratch(Jacobi::scratch_doubles(static_cast<int>(k)),
                                std::numeric_limits<double>::quiet_NaN());
    const mtl::SerialTeam team;
    Jacobi jacobi(team, static_cast<int>(k), scratch.data());
    for (std::size_t n = 0; n < k * k; ++n) jacobi.row(0)[n] = gram[n] /= largest > 0 ? largest : 1;
    const int sweeps = jacobi.run();
    most = std::max(most, sweeps);
    const double rounding = 1e-14 * static_cast<double>(k), residual = jacobi.residual();
    CHECK(residual <= 1e-15, "trial %d kind %d K %zu: residual %g", trial, kind, k, residual);
    double off = 0, skew = 0;
    for (int a = 0; a < static_cast<int>(k); ++a) {
      for (int b = 0; b <= a; ++b) {
        double sum = 0, dot = 0;
        for (int i = 0; i < static_cast<int>(k); ++i) {
          sum += jacobi.value(i) * jacobi.vector(i)[a] * jacobi.vector(i)[b];
          dot += jacobi.vector(a)[i] * jacobi.vector(b)[i];
        }
        off = std::max(off, std::fabs(sum - gram[static_cast<std::size_t>(a) * k + b]));
        skew = std::max(skew, std::fabs(dot - (a == b)));
      }
    }
    CHECK(off <= rounding && skew <= rounding, "trial %d kind %d K %zu: off %g, skew %g", trial, kind, k, off,
          skew);
  }
  CHECK(most <= 20, "%d sweeps", most);
}

void test_jacobi_on_graded_rows() {
  using Jacobi = mtl::Jacobi<mtl::SerialTeam>;
  std::mt19937 engine(23);
  for (int trial = 0; trial < 200; ++trial) {
    const std::size_t k = 2 + engine() % 12;
    Matrix rows = random_rows(engine, k, 4 * k, 0);
    for (std::size_t i = 0; i < k; ++i) {
      const double length = std::pow(10.0, -7.0 * static_cast<double>(i * 5 % k) / static_cast<double>(k));
      for (double& x : rows[i]) x *= length / std::sqrt(8.0 * static_cast<double>(k));
    }
    const std::vector<double> gram = gram_of(rows);
    std::vector<double> scratch(Jacobi::scratch_doubles(static_cast<int>(k)));
    const mtl::SerialTeam team;
    Jacobi jacobi(team, static_cast<int>(k), scratch.data());
    for (std::size_t n = 0; n < k * k; ++n) jacobi.row(0)[n] = gram[n];
    jacobi.run();
    // The product of the eigenvalues is the determinant, to a relative precision.
    std::vector<long double> a(gram.begin(), gram.end());
    long double determinant = 1, product = 1;
    for (std::size_t c = 0; c < k; ++c) {
      determinant *= a[c * k + c];
      product *= jacobi.value(static_cast<int>(c));
      for (std::size_t r = c + 1; r < k; ++r) {
        const long double factor = a[r * k + c] / a[c * k + c];
        for (std::size_t q = c; q < k; ++q) a[r * k + q] -= factor * a[c * k + q];
      }
    }
    const long double off = std::fabs(product / determinant - 1);
    CHECK(off < 1e-12L, "trial %d K %zu: %Lg", trial, k, off);
  }
}

// What the products of d with the unit rows are, on independent rows.
void test_spectral_weights() {
  std::mt19937 engine(29);
  for (int trial = 0; trial < 300; ++trial) {
    const std::size_t k = 1 + engine() % 16;
    const Matrix rows = random_rows(engine, k, 4 * k, trial % 2 == 0 ? 0 : 4);
    const std::vector<double> gram = gram_of(rows);
    const Result impartial = solve<mtl::ImtlG>(gram, {0.0}), free = solve<mtl::Config>(gram, {0.0, 0.0});
    double sum = 0, size = 0, least = 0, most = 0;
    for (const Result* found : {&impartial, &free}) {
      std::vector<double> products(k);
      double scale = 0;
      for (std::size_t i = 0; i < k; ++i) {
        scale += std::fabs(found->weights[i]) * std::sqrt(gram[i * k + i]);
        for (std::size_t j = 0; j < k; ++j)
          products[i] += gram[i * k + j] / std::sqrt(gram[i * k + i]) * found->weights[j];
      }
      least = *std::min_element(products.begin(), products.end());
      most = *std::max_element(products.begin(), products.end());
      CHECK(most - least <= 1e-13 * scale, "trial %d K %zu: products from %g to %g", trial, k, least, most);
      CHECK(found->gap <= 1e-15 && found->iterations <= 12, "trial %d: %g, %d sweeps", trial, found->gap,
            found->iterations);
    }
    CHECK(least > 0, "trial %d: a conflict", trial);
    for (double w : impartial.weights) {
      sum += w;
      size += std::fabs(w);
    }
    CHECK(std::fabs(sum - 1) <= 1e-14 * size, "trial %d: weights sum to %.17g", trial, sum);
  }
  const Result opposite = solve<mtl::ImtlG>({4, -2, -2, 1}, {0.0});
  CHECK(opposite.weights[0] == 0 && opposite.weights[1] == 0, "opposite rows");
  const Result zero = solve<mtl::AlignedMtl>({0, 0, 0, 0}, {0.0, 0.0});
  CHECK(zero.weights[0] == 0.5 && zero.weights[1] == 0.5, "rank 0: %g", zero.weights[0]);
  const Result diagonal = solve<mtl::AlignedMtl>({4, 0, 0, 0, 16, 0, 0, 0, 64}, {1.0, 0.0});
  CHECK(std::fabs(diagonal.weights[0] - 2.0 / 3) < 1e-15 && std::fabs(diagonal.weights[1] - 1.0 / 3) < 1e-15,
        "orthogonal rows: %g %g", diagonal.weights[0], diagonal.weights[1]);
}

template <class Solver>
void check_spectral_team(const std::vector<double>& gram, const std::vector<double>& options,
                         const std::vector<unsigned char>& active, int threads) {
  const Result alone = solve<Solver>(gram, options, active);
  const Result together = solve<Solver>(gram, options, active, nullptr, 0, threads);
  CHECK(alone.weights == together.weights && alone.iterations == together.iterations, "%s: %d threads",
        Solver::name, threads);
}

// max |w^(1/alpha) (G w) - 1| in long double, over the rounding that the weights alone leave there.
long double fair_residual(const std::vector<double>& gram, const std::vector<double>& w, double alpha) {
  const std::size_t k = w.size();
  long double worst = 0;
  for (std::size_t i = 0; i < k; ++i) {
    long double total = 0, terms = 0;
    for (std::size_t j = 0; j < k; ++j) {
      total += static_cast<long double>(gram[i * k + j]) * w[j];
      terms += std::fabs(static_cast<long double>(gram[i * k + j])) * w[j];
    }
    const long double power = std::pow(static_cast<long double>(w[i]), 1 / static_cast<long double>(alpha));
    worst = std::max(worst, std::fabs(power * total - 1) / (1 + power * terms));
  }
  return worst;
}

void test_fair() {
  std::mt19937 engine(29);
  int solved = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const std::size_t k = trial % 200 == 0 ? 128 : 1 + engine() % 12;
    const int kind = static_cast<int>(engine() % 6);
    const Matrix rows = kind == 5 && k > 1 ? nearly_cancelling(engine, k, 2 + engine() % 2, 1e-6, 1e-2)
                                           : random_rows(engine, k, 1 + engine() % (2 * k), kind % 5);
    const std::vector<double> gram = gram_of(rows);
    const double alphas[] = {0.1, 0.5, 1, 2, 10};
    const double alpha = alphas[engine() % 5];
    const Result found = solve<mtl::FairGrad>(gram, {alpha});
    if (found.gap == 1) {
      for (double w : found.weights) CHECK(w == 0, "trial %d: %g", trial, w);
      continue;
    }
    ++solved;
    const long double residual = fair_residual(gram, found.weights, alpha);
    CHECK(residual <= 1e-13L * std::max(1.0, alpha), "trial %d kind %d K %zu alpha %g: %Lg", trial, kind, k,
          alpha, residual);
    CHECK(found.iterations <= 100, "trial %d kind %d K %zu alpha %g: %d iterations", trial, kind, k, alpha,
          found.iterations);
    const Result nash = solve<mtl::NashMtl>(gram, {1, 0}, {}, nullptr, 0, 1, std::vector<double>(k, 7.0));
    const long double square = objective(rows, nash.weights);
    const long double unit = longest(rows, nash.weights);
    CHECK(nash.gap == 1 || std::fabs(square - 1) <= 1e-14L * (1 + unit * unit), "trial %d: %Lg", trial,
          square);
    for (std::size_t i = 0; i < k && nash.gap != 1; ++i)
      CHECK(k == 1 || nash.state[i] > nash.weights[i], "trial %d: the state before the clip", trial);
  }
  CHECK(solved > 1000, "%d", solved);
}

void test_teams() {
  std::mt19937 engine(13);
  for (int trial = 0; trial < 40; ++trial) {
    const std::size_t k = 1 + engine() % 9;
    const int kind = static_cast<int>(engine() % 5);
    const Matrix rows = kind == 4 && k > 1 ? nearly_cancelling(engine, k, 2, 3e-7, 1e-6)
                                           : random_rows(engine, k, 2 * k, kind % 4);
    const std::vector<double> gram = gram_of(rows);
    std::vector<unsigned char> active(k, 1);
    if (trial % 3 == 0) active[engine() % k] = 0;
    const std::int64_t rng[2] = {trial, 1};
    const int threads = 2 + trial % 4;
    const Result serial = solve<mtl::Pcgrad>(gram, {1, 1}, active, rng);
    const Result team = solve<mtl::Pcgrad>(gram, {1, 1}, active, rng, 0, threads);
    for (std::size_t i = 0; i < k; ++i) {
      CHECK(serial.weights[i] == team.weights[i], "trial %d: %d threads", trial, threads);
    }
    const Result vaccine = solve<mtl::Gradvac>(gram, {1, 1, 0.5}, active, rng);
    const Result vaccines = solve<mtl::Gradvac>(gram, {1, 1, 0.5}, active, rng, 0, threads);
    CHECK(vaccine.weights == vaccines.weights && vaccine.state == vaccines.state, "trial %d: %d threads",
          trial, threads);
    const Result averse = solve<mtl::Cagrad>(gram, {0.4, 0, 0}, active);
    const Result together = solve<mtl::Cagrad>(gram, {0.4, 0, 0}, active, nullptr, 0, threads);
    std::vector<double> off(k);
    for (std::size_t i = 0; i < k; ++i) off[i] = averse.weights[i] - together.weights[i];
    CHECK(objective(rows, off) < 1e-16L, "trial %d: %d threads: off by %Lg", trial, threads,
          objective(rows, off));
    for (double published : {0.0, 1.0}) {
      const Result alone = solve<mtl::MinNorm>(gram, {published, 20, 0}, active);
      const Result together = solve<mtl::MinNorm>(gram, {published, 20, 0}, active, nullptr, 0, threads);
      const long double difference = objective(rows, alone.weights) - objective(rows, together.weights);
      CHECK(std::fabs(difference) < 1e-12L, "trial %d: %d threads: %Lg", trial, threads, difference);
    }
    check_spectral_team<mtl::AlignedMtl>(gram, {static_cast<double>(trial % 3), 0.0}, active, threads);
    check_spectral_team<mtl::Config>(gram, {static_cast<double>(trial % 6), 0.0}, active, threads);
    check_spectral_team<mtl::ImtlG>(gram, {0.0}, active, threads);
    check_team<mtl::FairGrad>(gram, {2}, active, threads);
    check_team<mtl::NashMtl>(gram, {1, 0}, active, threads);
    if (kind == 4) continue;  // all but singular: a matter of rounding
    check_team<mtl::Upgrad>(gram, {1e-4}, active, threads);
    check_team<mtl::Dualproj>(gram, {1e-4}, active, threads);
    check_team<mtl::Pcd>(gram, {0.1, 0.9, 0.0}, active, threads);
  }
}

}  // namespace

int main() {
  test_philox();
  test_min_norm_against_brute_force();
  test_min_norm_large();
  test_min_norm_on_rows_that_nearly_cancel();
  test_min_norm_degenerate();
  test_frank_wolfe();
  test_pcgrad();
  test_gradvac();
  test_cagrad();
  test_jacobi();
  test_jacobi_on_graded_rows();
  test_spectral_weights();
  test_stochastic();
  test_removal();
  test_dual_cone();
  test_pcd();
  test_dual_cone_degenerate();
  test_fair();
  test_teams();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
