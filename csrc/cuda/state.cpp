#include "state.h"

#include <algorithm>

#include "occupancy.h"

namespace mtl::cuda {
namespace {

constexpr int kNumDTypes = 4;

}  // namespace

StatePlan::StatePlan(int device, const RowTable& states, const std::vector<DType>& row_dtypes, int num_groups,
                     StateOperation operation)
    : device_(device), operation_(operation) {
  const DeviceGuard guard(device);
  const std::int64_t K = states.num_tasks, P = states.num_params;
  std::vector<Item> items;
  std::vector<Shape> shapes(kNumDTypes * kNumDTypes, Shape{1, 1, 1});
  const auto use = [&](int kind) {
    const StateKernel kernel = kernel_of(kind);
    if (shapes[kind].step_columns != kernel.step_columns)
      shapes[kind] = {kernel.step_columns, kernel.max_steps, wave(kernel.run, device, kernel.threads, 0)};
  };
  for (std::int64_t p = 0; p < P; ++p) {
    const int kind = static_cast<int>(row_dtypes[p]) * kNumDTypes + static_cast<int>(states.dtypes[p]);
    use(kind);
    for (std::int64_t k = 0; k < K; ++k)
      items.push_back({k * P + p, states.numels[p], states.groups[p] * K + k, kind});
  }
  if (items.empty()) use(0);
  plan_ = make_plan(std::move(items), num_groups * K, shapes);
  for (const Part& part : plan_.parts) blocks_.push_back(std::min(part.num_slices, shapes[part.kind].blocks));
  tiles_at_ = words_.append(std::exchange(plan_.tiles, {}));  // first, where 16 bytes divide the address
  slices_at_ = words_.append(plan_.slices);
  groups_at_ = words_.append(plan_.groups);
}

StateKernel StatePlan::kernel_of(int kind) const {
  return state_kernel(static_cast<DType>(kind / kNumDTypes), static_cast<DType>(kind % kNumDTypes),
                      operation_);
}

std::int64_t StatePlan::sum_doubles() const {
  return static_cast<std::int64_t>(plan_.slices.size()) + plan_.num_pods;
}

std::int64_t StatePlan::num_counters() const {
  return plan_.num_pods + static_cast<std::int64_t>(plan_.groups.size());
}

void StateUpdate::run(cudaStream_t stream) const {
  const DeviceGuard guard(plan.device_);
  StateArgs args{};
  args.rows = rows;
  args.states = states;
  args.tiles = table_at<Tile>(words, plan.tiles_at_);
  args.slices = table_at<Slice>(words, plan.slices_at_);
  args.meeting = {table_at<GroupPods>(words, plan.groups_at_), workspace,
                  workspace + plan.plan_.slices.size(), counters, counters + plan.plan_.num_pods};
  args.call = call;
  args.sums = sums;
  for (std::size_t n = 0; n < plan.plan_.parts.size(); ++n) {
    const Part& part = plan.plan_.parts[n];
    const StateKernel kernel = plan.kernel_of(part.kind);
    args.first_slice = part.first_slice;
    args.num_slices = part.num_slices;
    launch(kernel.run, {static_cast<int>(plan.blocks_[n]), kernel.threads, 0, stream}, args, "update_state");
  }
}

}  // namespace mtl::cuda
