#include "combine.h"

#include <algorithm>

#include "occupancy.h"

namespace mtl::cuda {
namespace {

constexpr int kNumDTypes = 4;

}  // namespace

CombinePlan::CombinePlan(int device, const RowTable& rows, int num_groups, const std::vector<int>& outputs,
                         Combination combination)
    : combination_(combination), device_(device), num_tasks_(rows.num_tasks), num_params_(rows.num_params) {
  const DeviceGuard guard(device);
  slow_double_ = has_slow_double(device);
  std::vector<Item> items;
  for (std::int64_t p = 0; p < rows.num_params; ++p) {
    if (outputs[p] < 0 || rows.numels[p] == 0) continue;
    items.push_back(
        {p, rows.numels[p], rows.groups[p], static_cast<int>(rows.dtypes[p]) * kNumDTypes + outputs[p]});
  }
  std::vector<Shape> shapes(kNumDTypes * kNumDTypes, Shape{1, 1, 1});
  for (const Item& item : items) {
    const CombineKernel kernel = kernel_of(item.kind);
    if (shapes[item.kind].step_columns != kernel.step_columns)
      shapes[item.kind] = {kernel.step_columns, kernel.max_steps,
                           wave(kernel.run, device, kernel.threads, kernel.shared_bytes)};
  }
  if (!items.empty()) plan_ = make_plan(std::move(items), num_groups, shapes);
  for (const Part& part : plan_.parts) blocks_.push_back(std::min(part.num_slices, shapes[part.kind].blocks));
  tiles_at_ = words_.append(std::exchange(plan_.tiles, {}));  // first, where 16 bytes divide the address
  slices_at_ = words_.append(plan_.slices);
  std::vector<std::int64_t> first_elements;
  std::int64_t elements = 0;
  for (std::int64_t p = 0; p < rows.num_params; elements += rows.numels[p++])
    first_elements.push_back(elements);
  first_elements_at_ = words_.append(first_elements);
}

CombineKernel CombinePlan::kernel_of(int kind) const {
  const auto dtype = static_cast<DType>(kind / kNumDTypes), output = static_cast<DType>(kind % kNumDTypes);
  if (combination_ == Combination::kWeightedSum) return combine_kernel(dtype, output, slow_double_);
  if (dtype != output) throw std::invalid_argument("an output has another dtype than its rows");
  if (combination_ == Combination::kTrimmedMean) return trimmed_mean_kernel(dtype, num_tasks_);
  return graddrop_kernel(dtype, combination_ == Combination::kLeakyGradDrop);
}

void CombineCall::run(cudaStream_t stream) const {
  const DeviceGuard guard(plan.device_);
  CombineArgs args{};
  args.num_tasks = plan.num_tasks_;
  args.num_params = plan.num_params_;
  args.pointers = pointers;
  args.outputs = outputs;
  args.tiles = table_at<Tile>(words, plan.tiles_at_);
  args.slices = table_at<Slice>(words, plan.slices_at_);
  args.weights = weights;
  args.scale = scale;
  args.found_inf = found_inf;
  args.accumulate = accumulate;
  args.rng = rng;
  args.first_elements = table_at<std::int64_t>(words, plan.first_elements_at_);
  args.trim = trim;
  for (std::size_t n = 0; n < plan.plan_.parts.size(); ++n) {
    const Part& part = plan.plan_.parts[n];
    const CombineKernel kernel = plan.kernel_of(part.kind);
    args.first_slice = part.first_slice;
    args.num_slices = part.num_slices;
    launch(kernel.run, {static_cast<int>(plan.blocks_[n]), kernel.threads, kernel.shared_bytes, stream}, args,
           "combine");
  }
}

}  // namespace mtl::cuda
