#pragma once

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "mtl_kernels/solvers/find.h"
#include "solver_call.h"

namespace mtl::cuda {

// A solver by name with its arguments, all but the workspace and, after a gram kernel, the Gram matrix.
struct SolverArguments {
  std::string name;
  int num_tasks = 0;
  const double* gram = nullptr;
  const unsigned char* active = nullptr;
  std::int64_t active_stride = 0;
  std::int64_t* rng = nullptr;
  bool advance_rng = false;
  std::vector<double> options;
  const double* inputs = nullptr;
  std::int64_t inputs_stride = 0;
  double* state = nullptr;  // [batch, state_doubles]
  std::int64_t state_doubles = 0;
  double* weights = nullptr;      // [batch, K]
  double* certificate = nullptr;  // [batch, 2]
};

// Throws std::invalid_argument, see find_solver.
SolverInfo info_of(const SolverArguments& arguments);

// Doubles of workspace a block needs.
std::int64_t scratch_of(const SolverArguments& arguments);

// The kernel argument; `scratch` as there. Throws std::invalid_argument, see find_solver.
SolverCall make_call(const SolverArguments& arguments, double* scratch);

// Solves on their own, and what the runtime was asked for them: once for each device, solver and K, of which
// there are few. For any thread.
class SolvePlans {
 public:
  // Doubles of workspace that `solve` needs for a batch: 0 where shared memory has room.
  std::int64_t scratch_doubles(int device, const SolverArguments& arguments, std::int64_t batch);

  // Solves gram [batch, K, K] on the stream. One block a problem.
  void solve(int device, const SolverArguments& arguments, std::int64_t batch, double* scratch,
             cudaStream_t stream);

 private:
  struct Plan {
    int threads;
    std::size_t shared_bytes;      // 0: scratch in global memory
    std::int64_t scratch_doubles;  // of a block, in global memory
    std::int64_t wave;             // blocks at a time
  };
  static Plan make(int device, const SolverArguments& arguments);
  Plan find(int device, const SolverArguments& arguments);

  std::mutex mutex_;
  std::map<std::tuple<int, int, int>, Plan> plans_;  // by device, solver and K
};

}  // namespace mtl::cuda
