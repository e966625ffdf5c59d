// One block a problem: the solver headers, compiled for the device as they are, a kernel each.
#include "run_solver.h"
#include "solve_kernel.h"

namespace mtl::cuda {
namespace {

template <class Solver, int kMostTasks>
__global__ void __launch_bounds__(kSolveMaxThreads, 1) solve_batch(const __grid_constant__ SolveArgs args) {
  for (std::int64_t index = blockIdx.x; index < args.batch; index += gridDim.x)
    solve_one<Solver, kMostTasks>(problem_of(args.call, index));
}

using SolveKernel = void (*)(SolveArgs);

template <int kMostTasks, class... Solvers>
SolveKernel kernel_at(int position, SolverList<Solvers...>) {
  constexpr SolveKernel all[] = {solve_batch<Solvers, kMostTasks>...};
  return all[position];
}

}  // namespace

SolveKernel solve_kernel(int solver, int num_tasks) {
  return num_tasks <= kWarp ? kernel_at<kWarp>(solver, AllSolvers{})
                            : kernel_at<kMaxTasks>(solver, AllSolvers{});
}

}  // namespace mtl::cuda
