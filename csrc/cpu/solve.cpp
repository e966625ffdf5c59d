#include "solve.h"

#include <stdexcept>
#include <vector>

#include "mtl_kernels/solvers/all.h"
#include "parallel.h"

namespace mtl::cpu {
namespace {

// Below this many Gram entries in all, waking other threads costs more than the solves.
constexpr std::int64_t kSerialEntries = 2048;

// A copy with its own scratch, which a thread keeps: problems come by the thousand, one per layer.
template <class Solver>
void solve_one(Problem problem) {
  thread_local std::vector<double> scratch;
  const std::size_t needed = Solver::scratch_doubles(problem.num_tasks);
  if (scratch.size() < needed) scratch.resize(needed);
  problem.scratch = scratch.data();
  Solver::solve(SerialTeam{}, problem);
}

struct Entry {
  void (*solve)(Problem) = nullptr;
  std::size_t num_options = 0;
  bool (*needs_rng)(const double*) = nullptr;
};

template <class... Solvers>
Entry find(const std::string& name, SolverList<Solvers...>) {
  Entry found;
  ((name == Solvers::name ? void(found = {solve_one<Solvers>, Solvers::num_options, Solvers::needs_rng})
                          : void()),
   ...);
  return found;
}

}  // namespace

void solve(const std::string& name, std::int64_t batch, int num_tasks, const double* gram,
           const unsigned char* active, std::int64_t active_stride, const std::int64_t* rng,
           const std::vector<double>& options, const double* inputs, std::int64_t inputs_stride,
           double* weights, double* certificate, int threads) {
  const Entry solver = find(name, AllSolvers{});
  if (solver.solve == nullptr) throw std::invalid_argument("unknown solver '" + name + "'");
  if (options.size() != solver.num_options) {
    throw std::invalid_argument("solver '" + name + "' takes " + std::to_string(solver.num_options) +
                                " options, found " + std::to_string(options.size()));
  }
  if (rng == nullptr && solver.needs_rng(options.data()))
    throw std::invalid_argument("solver '" + name + "' needs an rng state with these options");
  if (num_tasks < 1 || num_tasks > kMaxTasks) {
    throw std::invalid_argument("expected 1 to " + std::to_string(kMaxTasks) + " tasks, found " +
                                std::to_string(num_tasks));
  }
  const std::int64_t entries = static_cast<std::int64_t>(num_tasks) * num_tasks;
  parallel_for(batch, batch * entries < kSerialEntries ? 1 : threads, [&](std::int64_t index) {
    Problem problem{};
    problem.num_tasks = num_tasks;
    problem.gram = gram + index * entries;
    problem.active = active == nullptr ? nullptr : active + index * active_stride;
    problem.rng = rng;
    problem.index = index;
    problem.options = options.data();
    problem.inputs = inputs == nullptr ? nullptr : inputs + index * inputs_stride;
    problem.weights = weights + index * num_tasks;
    double unwanted[2];
    problem.certificate = certificate == nullptr ? unwanted : certificate + index * 2;
    solver.solve(problem);
  });
}

}  // namespace mtl::cpu
