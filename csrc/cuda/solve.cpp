#include "solve.h"

#include <algorithm>

#include "mtl_kernels/solvers/find.h"
#include "occupancy.h"
#include "solve_kernel.h"

namespace mtl::cuda {
namespace {

constexpr std::size_t kStaticSharedBytes = 1024;  // at least what the kernel has besides

struct Plan {
  int threads;
  std::size_t shared_bytes;
  std::int64_t blocks;
  std::int64_t scratch_doubles;  // of all blocks, 0: in shared memory
};

Plan make_plan(int device, const SolverArguments& arguments, std::int64_t batch) {
  const std::int64_t doubles = scratch_of(arguments);
  const std::size_t bytes = static_cast<std::size_t>(doubles) * sizeof(double);
  const auto room = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const bool shared = bytes + kStaticSharedBytes <= room;
  Plan plan{};
  // A warp has the fastest barriers, and small problems no work for more.
  plan.threads = arguments.num_tasks <= kWarp ? kWarp : kSolveMaxThreads;
  plan.shared_bytes = shared ? bytes : 0;
  plan.blocks = std::min(batch, wave(solve_kernel(), device, plan.threads, plan.shared_bytes));
  plan.scratch_doubles = shared ? 0 : doubles * plan.blocks;
  return plan;
}

}  // namespace

std::int64_t scratch_of(const SolverArguments& arguments) {
  const SolverInfo solver =
      find_solver(arguments.name, arguments.num_tasks, arguments.options, arguments.rng != nullptr);
  return static_cast<std::int64_t>(solver.scratch_doubles(arguments.num_tasks));
}

SolverCall make_call(const SolverArguments& arguments, double* scratch) {
  SolverCall call{};
  call.solver =
      find_solver(arguments.name, arguments.num_tasks, arguments.options, arguments.rng != nullptr).position;
  call.num_tasks = arguments.num_tasks;
  call.gram = arguments.gram;
  call.active = arguments.active;
  call.active_stride = arguments.active_stride;
  call.rng = arguments.rng;
  call.advance_rng = arguments.advance_rng;
  if (arguments.options.size() > kMaxOptions) throw std::invalid_argument("too many options");
  std::copy(arguments.options.begin(), arguments.options.end(), call.options);
  call.inputs = arguments.inputs;
  call.inputs_stride = arguments.inputs_stride;
  call.weights = arguments.weights;
  call.certificate = arguments.certificate;
  call.scratch = scratch;
  call.scratch_doubles = scratch_of(arguments);
  return call;
}

std::int64_t solve_scratch(int device, const SolverArguments& arguments, std::int64_t batch) {
  const DeviceGuard guard(device);
  return batch == 0 ? 0 : make_plan(device, arguments, batch).scratch_doubles;
}

void solve(int device, const SolverArguments& arguments, std::int64_t batch, double* scratch,
           cudaStream_t stream) {
  const DeviceGuard guard(device);
  const SolverCall call = make_call(arguments, scratch);
  if (batch == 0) return;
  const Plan plan = make_plan(device, arguments, batch);
  if (plan.scratch_doubles > 0 && scratch == nullptr) throw std::invalid_argument("solve needs a workspace");
  launch(solve_kernel(), {static_cast<int>(plan.blocks), plan.threads, plan.shared_bytes, stream},
         SolveArgs{batch, call}, "solve");
}

}  // namespace mtl::cuda
