// One block a problem: the solver headers, compiled for the device as they are.
#include "run_solver.h"
#include "solve_kernel.h"

namespace mtl::cuda {
namespace {

template <int kMostTasks>
__global__ void __launch_bounds__(kSolveMaxThreads, 1) solve_batch(const __grid_constant__ SolveArgs args) {
  for (std::int64_t index = blockIdx.x; index < args.batch; index += gridDim.x)
    solve_problem<kMostTasks>(args.call, index);
}

}  // namespace

void (*solve_kernel(int num_tasks))(SolveArgs) {
  return num_tasks <= kWarp ? solve_batch<kWarp> : solve_batch<kMaxTasks>;
}

}  // namespace mtl::cuda
