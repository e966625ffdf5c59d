// Batches of problems, in shared and in global scratch; and what a failing call says.
#include <thread>

#include "combine.h"
#include "cuda_test.h"
#include "gram.h"
#include "solve.h"
#include "upload.h"

namespace test {
namespace {

using mtl::cuda::SolvePlans;
using mtl::cuda::SolverArguments;

// The Gram matrices of random rows, of every rank; one of rows that nearly cancel in pairs, and the last of
// them not finite.
std::vector<double> draw_grams(int K, std::int64_t batch) {
  std::vector<double> grams(static_cast<std::size_t>(batch) * K * K);
  for (std::int64_t b = 0; b < batch; ++b) {
    const bool opposite = batch == 2 ? b == 1 && K % 2 == 0 : b == 2;
    const int rank = b % 2 == 0 || opposite ? K + 3 : 1 + K / 2;
    std::vector<double> rows(static_cast<std::size_t>(K) * rank);
    for (double& x : rows) x = draw_normal() + 0.1;
    for (int n = rank; opposite && n < 2 * (K / 2) * rank; ++n)
      if (n / rank % 2 == 1) rows[n] = 1e-6 * rows[n] - rows[n - rank];
    double* gram = &grams[b * K * K];
    for (int i = 0; i < K; ++i) {
      for (int j = 0; j < K; ++j)
        for (int n = 0; n < rank; ++n) gram[i * K + j] += rows[i * rank + n] * rows[j * rank + n];
    }
    if (b == 3) gram[K * K - 1] = NAN;
  }
  return grams;
}

void check(SolvePlans* plans, const SolverCase& solver, int K, std::int64_t batch, int masks) {
  context() = std::string(solver.name) + " " + std::to_string(solver.options[0]) +
              ", K = " + std::to_string(K) + ", batch of " + std::to_string(batch);
  const std::vector<double> grams = draw_grams(K, batch);
  std::vector<unsigned char> active(static_cast<std::size_t>(masks == 2 ? batch * K : masks * K));
  for (std::size_t n = 0; n < active.size(); ++n) active[n] = n % 5 != 2 && n / K != 4;
  std::vector<std::int64_t> rng = {1234567890123, 4294967300};
  SolverArguments arguments;
  arguments.name = solver.name;
  arguments.num_tasks = K;
  arguments.gram = grams.data();
  arguments.active = masks > 0 ? active.data() : nullptr;
  arguments.active_stride = masks == 2 ? K : 0;
  arguments.rng = rng.data();
  arguments.options = solver.options;
  std::vector<double> weights(static_cast<std::size_t>(batch) * K),
      certificate(static_cast<std::size_t>(batch) * 2);
  std::vector<double> inputs(static_cast<std::size_t>(K));
  for (int k = 0; k < K; ++k) inputs[k] = input_of(k);
  arguments.inputs = solver.has_inputs ? inputs.data() : nullptr;
  const std::size_t kept = mtl::detail::find_solver(solver.name, mtl::AllSolvers{}).state_doubles(K);
  std::vector<double> state;
  arguments.state_doubles = static_cast<std::int64_t>(kept);
  std::vector<double> scratch(static_cast<std::size_t>(plans->scratch_doubles(0, arguments, batch)), NAN);
  std::vector<double> first;
  in_orders([&] {
    state.assign(static_cast<std::size_t>(batch) * kept, 0.0);
    arguments.state = state.data();
    weights.assign(weights.size(), NAN);
    certificate.assign(certificate.size(), NAN);
    arguments.weights = weights.data();
    arguments.certificate = certificate.data();
    plans->solve(0, arguments, batch, scratch.empty() ? nullptr : scratch.data(), nullptr);
    if (first.empty()) first = weights;
    expect(same_bits(first, weights), "the same bits in every order");
  });
  expect(rng[0] == 1234567890123 && rng[1] == 4294967300, "solve leaves the random state alone");
  for (std::int64_t b = 0; b < batch; ++b) {
    const unsigned char* mask = masks == 0 ? nullptr : active.data() + (masks == 2 ? b * K : 0);
    const double* gram = &grams[b * K * K];
    const Solution host = solve_on_host(solver, K, gram, mask, rng.data(), b);
    expect_same_solution(solver, K, gram, &weights[b * K], &certificate[b * 2],
                         state.data() + static_cast<std::size_t>(b) * kept, host);
  }
}

SolverArguments arguments_of(const SolverCase& solver, int K) {
  SolverArguments arguments;
  arguments.name = solver.name;
  arguments.num_tasks = K;
  arguments.options = solver.options;
  arguments.state_doubles =
      static_cast<std::int64_t>(mtl::detail::find_solver(solver.name, mtl::AllSolvers{}).state_doubles(K));
  return arguments;
}

// What the runtime says is asked for once; each solver and K has a plan of its own, any batch the same.
void test_plans_are_kept() {
  context() = "plans of solve";
  emulation::Options& set = emulation::options();
  const int room = std::exchange(set.shared_bytes_opt_in, 2 << 10);
  const SolverCase pcgrad{"pcgrad", {0, 0}}, min_norm{"min_norm", {0, 0, 0}};
  const int blocks = set.multiprocessors * set.blocks_per_multiprocessor;
  SolvePlans plans;
  const auto scratch = [&](const SolverCase& solver, int K, std::int64_t batch) {
    return plans.scratch_doubles(0, arguments_of(solver, K), batch);
  };
  const std::int64_t one = scratch(pcgrad, 40, 1), other = scratch(min_norm, 40, 1);
  expect(one > 0 && other > 0 && one != other, "scratch of two solvers");
  const int before = std::exchange(set.blocks_per_multiprocessor, 0);
  expect(scratch(pcgrad, 40, 1) == one && scratch(min_norm, 40, 1) == other, "plans are kept");
  expect(scratch(pcgrad, 40, 0) == 0 && scratch(pcgrad, 40, 2) == 2 * one, "scratch of a batch");
  expect(scratch(pcgrad, 40, 1000) == blocks * one, "scratch of as many blocks as run");
  check(&plans, pcgrad, 40, 2, 0);
  expect_error<std::runtime_error>("bytes of shared memory", [&] { scratch(pcgrad, 41, 1); });
  set.blocks_per_multiprocessor = before;
  expect(scratch(pcgrad, 41, 1) > one, "scratch of another K, which failed before");
  expect_error<std::runtime_error>("cudaSetDevice",
                                   [&] { plans.scratch_doubles(1, arguments_of(pcgrad, 40), 1); });
  set.shared_bytes_opt_in = room;
}

void test_plans_of_several_threads() {
  SolvePlans plans;
  std::vector<std::thread> threads;
  for (int n = 0; n < 4; ++n) {
    threads.emplace_back([&plans, n] {
      for (int K = 1 + n % 2; K <= mtl::kMaxTasks; ++K)
        plans.scratch_doubles(0, arguments_of({"min_norm", {0, 0, 0}}, K), 3);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void test_solve() {
  set_device(1, 2);  // several problems a block
  const SolverCase solvers[] = {{"pcgrad", {1, 1}},
                                {"pcgrad", {0, 0}},
                                {"min_norm", {0, 0, 0}},
                                {"min_norm", {1, 50, 0}},
                                {"cagrad", {0.4, 1, 1}},
                                {"gradvac", {1, 0, 0.5}},
                                {"upgrad", {1e-4}},
                                {"dualproj", {1e-4}, true},
                                {"pcd", {0.02, 0.999, 1e-8}},
                                {"modo", {0.1, 0.1}},
                                {"sdmgrad", {0.3, 10, 0.5, 20, 1}, true},
                                {"fairgrad", {2}},
                                {"nash_mtl", {1, 0}},
                                {"krum", {1, 2}},
                                {"aligned_mtl", {1, 1e-9}},
                                {"config", {3, 0}},
                                {"imtl_g", {0}},
                                {"random_weights", {0}}};
  const int opt_in = emulation::options().shared_bytes_opt_in;
  for (const int room : {opt_in, 2 << 10}) {
    emulation::options().shared_bytes_opt_in = room;
    SolvePlans plans;
    // Solvers that are kernels of their own take seconds at 128 tasks here; a block has one problem from 33
    // on.
    const std::vector<int> sizes = room != opt_in ? std::vector<int>{33}
                                   : kForRaces    ? std::vector<int>{2, 33}
                                                  : std::vector<int>{1, 2, 8, 31, 33, 64, 128};
    for (const int K : sizes) {
      for (const SolverCase& solver : solvers) {
        const bool fused = std::string(solver.name) == "pcgrad" || std::string(solver.name) == "min_norm";
        if (fused || (K <= 33 && K != 8))
          check(&plans, solver, K, K > 33 || (kForRaces && !fused) ? 2 : 5, draw(3));
      }
    }
  }
  emulation::options().shared_bytes_opt_in = opt_in;
  SolvePlans plans;
  check(&plans, solvers[0], 4, 0, 0);
  check(&plans, solvers[2], 4, 1, 1);
  test_plans_are_kept();
  test_plans_of_several_threads();
}

// GPUs for consumers have 99 KB of shared memory for a block.
void test_small_devices() {
  emulation::Options& set = emulation::options();
  const int room = std::exchange(set.shared_bytes_opt_in, 99 << 10);
  for (const DType dtype : kDTypes) {
    for (int K = 1; K <= mtl::kMaxTasks; ++K) {
      const Table table(K, 1, {{dtype, 8}});
      mtl::cuda::GramPlan(0, table.rows(), 1);
      mtl::cuda::CombinePlan(0, table.rows(), 1, {static_cast<int>(dtype)});
    }
  }
  set.shared_bytes_opt_in = room;
}

// Whatever context a thread has, it has again after a call: none as well.
void test_context() {
  const auto get_context = mtl::cuda::driver_function<int(void**)>("cuCtxGetCurrent");
  const auto set_context = mtl::cuda::driver_function<int(void*)>("cuCtxSetCurrent");
  char other;
  for (void* before : {static_cast<void*>(nullptr), static_cast<void*>(&other)}) {
    set_context(before);
    {
      const mtl::cuda::DeviceGuard guard(0);
      void* now = nullptr;
      get_context(&now);
      expect(now != nullptr && now != &other, "the context of the device");
    }
    void* after = nullptr;
    get_context(&after);
    expect(after == before, "the context from before");
  }
  set_context(nullptr);
}

// While another thread captures a stream: whatever loads a kernel or takes memory would end its capture.
void test_beside_a_capture() {
  context() = "beside a capture";
  emulation::Options& set = emulation::options();
  set.capturing_elsewhere = true;
  void* memory = nullptr;
  expect(cudaMalloc(&memory, 8) == cudaErrorStreamCaptureUnsupported && memory == nullptr,
         "the emulation refuses what a capture does not allow");
  const Table table(9, 1, {{DType::kFloat32, 8}});
  mtl::cuda::GramPlan(0, table.rows(), 1);
  mtl::cuda::CombinePlan(0, table.rows(), 1, {0});
  SolvePlans().scratch_doubles(0, arguments_of({"pcgrad", {0, 0}}, 9), 1);
  mtl::cuda::DeviceCopy(0, table.pointers().data(), 8);
  set.capturing_elsewhere = false;
  static_cast<void>(cudaGetLastError());
}

void test_errors() {
  test_context();
  test_beside_a_capture();
  test_small_devices();
  using mtl::cuda::GramPlan;
  const Table table(2, 1, {{DType::kFloat32, 8}});
  const mtl::RowTable rows = table.rows();
  expect_error<std::runtime_error>("cudaSetDevice", [&] { GramPlan(1, rows, 1); });
  emulation::Options& set = emulation::options();
  set.blocks_per_multiprocessor = 0;
  expect_error<std::runtime_error>("use backend='triton'", [&] { GramPlan(0, rows, 1); });
  set.blocks_per_multiprocessor = 2;
  {
    const Table wide(128, 1, {{DType::kFloat32, 8}});
    const int room = std::exchange(set.shared_bytes_opt_in, 48 << 10);
    expect_error<std::runtime_error>("bytes of shared memory, and this device has",
                                     [&] { GramPlan(0, wide.rows(), 1); });
    set.shared_bytes_opt_in = room;
  }
  set.device_error = cudaErrorInsufficientDriver;
  expect_error<std::runtime_error>("update the driver", [&] { GramPlan(0, rows, 1); });
  set.device_error = cudaSuccess;

  const GramPlan plan(0, rows, 1);
  std::vector<double> sums(static_cast<std::size_t>(plan.sum_doubles())), gram(4), weights(2), certificate(2);
  std::vector<unsigned> counters(static_cast<std::size_t>(plan.num_counters()));
  SolverArguments solver;
  solver.name = "min_norm";
  solver.num_tasks = 2;
  solver.options = {0, 0, 0};
  solver.gram = gram.data();
  solver.weights = weights.data();
  solver.certificate = certificate.data();
  const auto run = [&](const SolverArguments* behind) {
    mtl::cuda::GramCall{plan,
                        table.pointers().data(),
                        plan.words().data(),
                        sums.data(),
                        counters.data(),
                        gram.data(),
                        nullptr,
                        nullptr,
                        behind,
                        nullptr}
        .run(nullptr);
  };
  set.launch_error = cudaErrorNoKernelImageForDevice;
  expect_error<std::runtime_error>("rebuild for this GPU", [&] { run(nullptr); });
  set.launch_error = cudaSuccess;
  expect(cudaGetLastError() != cudaSuccess && cudaGetLastError() == cudaSuccess,
         "an error is forgotten once read");
  solver.options = {0};
  expect_error<std::invalid_argument>("takes 3 options", [&] { run(&solver); });
  solver.name = "unknown";
  expect_error<std::invalid_argument>("unknown solver", [&] { run(&solver); });
  expect_error<std::invalid_argument>("unknown solver",
                                      [&] { SolvePlans().solve(0, solver, 1, nullptr, nullptr); });
  solver.name = "pcgrad";
  solver.options = {1, 0};
  expect_error<std::invalid_argument>("needs an rng state",
                                      [&] { SolvePlans().scratch_doubles(0, solver, 1); });

  const int room = std::exchange(set.shared_bytes_opt_in, 1 << 10);
  solver.options = {0, 0};
  solver.num_tasks = 20;
  expect_error<std::invalid_argument>("needs a workspace",
                                      [&] { SolvePlans().solve(0, solver, 1, nullptr, nullptr); });
  set.shared_bytes_opt_in = room;

  const Table wide(128, 1, {{DType::kFloat32, 8}});
  const GramPlan wide_plan(0, wide.rows(), 1);
  solver.num_tasks = 128;
  expect(wide_plan.scratch_doubles(solver) > 0, "131 KB are more than a gram kernel's shared memory");
  expect_error<std::invalid_argument>("needs a workspace", [&] {
    mtl::cuda::GramCall{wide_plan,
                        wide.pointers().data(),
                        wide_plan.words().data(),
                        nullptr,
                        nullptr,
                        nullptr,
                        nullptr,
                        nullptr,
                        &solver,
                        nullptr}
        .run(nullptr);
  });
}

}  // namespace test
