#include "elementwise.h"

#include <vector>

#include "kernels.h"
#include "mtl_kernels/chunks.h"
#include "parallel.h"
#include "scratch.h"

namespace mtl::cpu {
namespace {

constexpr std::int64_t kAlignment = 1024, kMaxChunks = 256;

// Elements below which another thread is not worth waking.
constexpr std::int64_t kMinElements = 1 << 16;

}  // namespace

void reduce_columns(const RowTable& rows, const ColumnCall& call, const std::uintptr_t* out, int threads) {
  std::vector<std::int64_t> first(rows.num_params);
  std::int64_t columns = 0;
  for (std::int64_t p = 0; p < rows.num_params; ++p) {
    first[p] = columns;
    columns += rows.numels[p];
  }
  const Kernels& isa = kernels();
  const std::size_t scratch = isa.reduce_scratch(rows.num_tasks);
  const std::int64_t chunks = columns * rows.num_tasks / kMinElements;
  const ChunkPlan plan = plan_chunks(rows, kAlignment, chunks > 1 ? columns / chunks : columns, kMaxChunks);
  parallel_for(static_cast<std::int64_t>(plan.chunks.size()), threads, [&](std::int64_t i) {
    const Chunk& chunk = plan.chunks[i];
    for (std::int64_t s = chunk.first_segment; s < chunk.first_segment + chunk.num_segments; ++s) {
      const Segment& segment = plan.segments[s];
      if (out[segment.param] != 0)
        isa.reduce_segment(rows, segment, call, first[segment.param], out[segment.param],
                           thread_scratch(scratch));
    }
  });
}

void update_state(const RowTable& state, const std::uintptr_t* rows, const DType* row_dtypes, int num_groups,
                  const StateCall& call, double* sums, int threads) {
  // A row and its state alone: what is one parameter of K tasks elsewhere is K parameters of one task here.
  const std::int64_t P = state.num_params, pieces = state.num_tasks * P;
  std::vector<std::int64_t> numels(pieces);
  std::vector<std::int32_t> places(pieces);  // in the sums
  for (std::int64_t n = 0; n < pieces; ++n) {
    numels[n] = state.pointers[n] == 0 ? 0 : state.numels[n % P];
    places[n] = state.groups[n % P] * state.num_tasks + static_cast<std::int32_t>(n / P);
  }
  const RowTable table{1, pieces, state.pointers, numels.data(), nullptr, places.data()};
  const ChunkPlan plan = plan_chunks(table, kAlignment, kMinElements, kMaxChunks);
  const Kernels& isa = kernels();
  std::vector<double> partials(plan.chunks.size());
  parallel_for(static_cast<std::int64_t>(plan.chunks.size()), threads, [&](std::int64_t i) {
    const Chunk& chunk = plan.chunks[i];
    double sum = 0;
    for (std::int64_t s = chunk.first_segment; s < chunk.first_segment + chunk.num_segments; ++s) {
      const Segment& segment = plan.segments[s];
      const std::int64_t p = segment.param % P;
      sum += isa.update_segment({rows[segment.param], row_dtypes[p]},
                                {state.pointers[segment.param], state.dtypes[p]}, segment.begin,
                                segment.length, call, chunk.group);
    }
    partials[i] = sum;
  });
  for (std::int64_t n = 0; n < static_cast<std::int64_t>(num_groups) * state.num_tasks; ++n) sums[n] = 0;
  for (std::size_t i = 0; i < plan.chunks.size(); ++i) sums[plan.chunks[i].group] += partials[i];
}

}  // namespace mtl::cpu
