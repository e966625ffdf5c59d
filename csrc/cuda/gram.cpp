#include "gram.h"

#include <algorithm>

#include "occupancy.h"

namespace mtl::cuda {
namespace {

constexpr int kNumDTypes = 4;

// Scratch of a solver up to here costs a gram kernel no block on any multiprocessor.
constexpr std::size_t kSmallScratchBytes = 8 << 10;

}  // namespace

GramPlan::GramPlan(int device, const RowTable& rows, int num_groups)
    : device_(device), num_tasks_(rows.num_tasks), num_params_(rows.num_params) {
  const DeviceGuard guard(device);
  slow_double_ = has_slow_double(device);
  std::vector<Item> items;
  std::vector<Shape> shapes(kNumDTypes, Shape{1, 1, 1});
  for (std::int64_t p = 0; p < rows.num_params; ++p) {
    const int kind = static_cast<int>(rows.dtypes[p]);
    items.push_back({p, rows.numels[p], rows.groups[p], kind});
  }
  for (int kind = 0; kind < kNumDTypes; ++kind) {
    const bool used =
        std::any_of(items.begin(), items.end(), [&](const Item& item) { return item.kind == kind; });
    if (!used && !(items.empty() && kind == 0)) continue;
    const GramKernel kernel = kernel_of(kind);
    shapes[kind] = {
        kernel.step_columns, kernel.max_steps,
        wave(kernel.run, device, kernel.threads, std::max(kernel.shared_bytes, kSmallScratchBytes)),
        kernel.long_steps};
  }
  plan_ = make_plan(std::move(items), num_groups, shapes);
  for (const Part& part : plan_.parts) blocks_.push_back(std::min(part.num_slices, shapes[part.kind].blocks));
  tiles_at_ = words_.append(std::exchange(plan_.tiles, {}));  // first, where 16 bytes divide the address
  slices_at_ = words_.append(plan_.slices);
  groups_at_ = words_.append(plan_.groups);
}

GramKernel GramPlan::kernel_of(int kind) const {
  return gram_kernel(static_cast<DType>(kind), num_tasks_, slow_double_);
}

std::int64_t GramPlan::sum_doubles() const {
  return (static_cast<std::int64_t>(plan_.slices.size()) + plan_.num_pods) * num_pairs(num_tasks_);
}

std::int64_t GramPlan::num_counters() const {
  return plan_.num_pods + static_cast<std::int64_t>(plan_.groups.size()) + 1;
}

std::int64_t GramPlan::max_blocks() const { return *std::max_element(blocks_.begin(), blocks_.end()); }

std::int64_t GramPlan::scratch_doubles(const SolverArguments& solver) const {
  const std::int64_t doubles = scratch_of(solver);
  const bool shared = std::all_of(plan_.parts.begin(), plan_.parts.end(), [&](const Part& part) {
    return static_cast<std::size_t>(doubles) * sizeof(double) <= shared_bytes(part, 0);
  });
  return shared ? 0 : doubles * max_blocks();
}

std::size_t GramPlan::shared_bytes(const Part& part, std::int64_t scratch_doubles) const {
  const std::size_t own = kernel_of(part.kind).shared_bytes;
  return std::max(own, scratch_doubles == 0 ? kSmallScratchBytes : std::size_t{0});
}

void GramCall::run(cudaStream_t stream) const {
  const DeviceGuard guard(plan.device_);
  GramArgs args{};
  args.num_tasks = plan.num_tasks_;
  args.num_params = plan.num_params_;
  args.pointers = pointers;
  args.tiles = table_at<Tile>(words, plan.tiles_at_);
  args.slices = table_at<Slice>(words, plan.slices_at_);
  args.num_groups = static_cast<std::int64_t>(plan.plan_.groups.size());
  args.meeting = {table_at<GroupPods>(words, plan.groups_at_), sums,
                  sums + static_cast<std::int64_t>(plan.plan_.slices.size()) * num_pairs(plan.num_tasks_),
                  counters, counters + plan.plan_.num_pods};
  args.arrivals = args.meeting.group_arrivals + plan.plan_.groups.size();
  args.gram = gram;
  args.norms = norms;
  args.cosines = cosines;
  args.solver.solver = -1;
  if (solver != nullptr) {
    if (!info_of(*solver).is_fused())
      throw std::invalid_argument("solver '" + solver->name + "' is a launch of its own, after gram");
    if (plan.scratch_doubles(*solver) > 0 && scratch == nullptr)
      throw std::invalid_argument("this solver needs a workspace");
    args.solver = make_call(*solver, scratch);
    args.solver.gram = gram;
  }
  for (std::size_t n = 0; n < plan.plan_.parts.size(); ++n) {
    const Part& part = plan.plan_.parts[n];
    const GramKernel kernel = plan.kernel_of(part.kind);
    args.first_slice = part.first_slice;
    args.num_slices = part.num_slices;
    // Whoever finishes a group runs its solver, whichever dtype it came from.
    const std::size_t shared = plan.shared_bytes(part, solver == nullptr ? 1 : plan.scratch_doubles(*solver));
    launch(kernel.run, {static_cast<int>(plan.blocks_[n]), kernel.threads, shared, stream}, args, "gram");
  }
}

}  // namespace mtl::cuda
