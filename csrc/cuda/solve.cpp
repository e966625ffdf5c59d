#include "solve.h"

#include <algorithm>

#include "occupancy.h"
#include "solve_kernel.h"

namespace mtl::cuda {

SolverInfo info_of(const SolverArguments& arguments) {
  return find_solver(arguments.name, arguments.num_tasks, arguments.options, arguments.rng != nullptr,
                     arguments.state_doubles);
}

std::int64_t scratch_of(const SolverArguments& arguments) {
  return static_cast<std::int64_t>(info_of(arguments).scratch_doubles(arguments.num_tasks));
}

SolverCall make_call(const SolverArguments& arguments, double* scratch) {
  SolverCall call{};
  call.solver = info_of(arguments).position;
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
  call.state = arguments.state;
  call.state_doubles = arguments.state_doubles;
  call.weights = arguments.weights;
  call.certificate = arguments.certificate;
  call.scratch = scratch;
  call.scratch_doubles = scratch_of(arguments);
  return call;
}

SolvePlans::Plan SolvePlans::make(int device, const SolverArguments& arguments) {
  const DeviceGuard guard(device);
  const SolverInfo solver = info_of(arguments);
  const int K = arguments.num_tasks;
  const auto doubles = static_cast<std::int64_t>(solver.scratch_doubles(K));
  const std::size_t bytes = static_cast<std::size_t>(doubles) * sizeof(double);
  const auto kernel = solve_kernel(solver.position, K);
  const bool shared = bytes <= dynamic_shared_limit(kernel, device);
  Plan plan{};
  // A warp for each of the rows; or one in all, which has the fastest barriers, where small problems have no
  // work for more.
  plan.threads = solver.independent_rows ? std::min(K * kWarp, kSolveMaxThreads)
                 : K <= kWarp            ? kWarp
                                         : kMaxTasks;
  plan.shared_bytes = shared ? bytes : 0;
  plan.scratch_doubles = shared ? 0 : doubles;
  plan.wave = wave(kernel, device, plan.threads, plan.shared_bytes);
  return plan;
}

SolvePlans::Plan SolvePlans::find(int device, const SolverArguments& arguments) {
  const std::tuple key{device, info_of(arguments).position, arguments.num_tasks};
  const std::lock_guard lock(mutex_);
  const auto found = plans_.find(key);
  return found != plans_.end() ? found->second : plans_.emplace(key, make(device, arguments)).first->second;
}

std::int64_t SolvePlans::scratch_doubles(int device, const SolverArguments& arguments, std::int64_t batch) {
  const Plan plan = find(device, arguments);
  return plan.scratch_doubles * std::min(batch, plan.wave);
}

void SolvePlans::solve(int device, const SolverArguments& arguments, std::int64_t batch, double* scratch,
                       cudaStream_t stream) {
  const DeviceGuard guard(device);
  const SolverCall call = make_call(arguments, scratch);
  if (batch == 0) return;
  const Plan plan = find(device, arguments);
  if (plan.scratch_doubles > 0 && scratch == nullptr) throw std::invalid_argument("solve needs a workspace");
  launch(solve_kernel(call.solver, arguments.num_tasks),
         {static_cast<int>(std::min(batch, plan.wave)), plan.threads, plan.shared_bytes, stream},
         SolveArgs{batch, call}, "solve");
}

}  // namespace mtl::cuda
