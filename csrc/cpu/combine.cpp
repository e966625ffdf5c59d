#include "combine.h"

#include <vector>

#include "kernels.h"
#include "mtl_kernels/chunks.h"
#include "parallel.h"

namespace mtl::cpu {
namespace {

constexpr std::int64_t kAlignment = 1024, kMaxChunks = 256;

// Elements of rows below which another thread is not worth waking.
constexpr std::int64_t kMinElements = 1 << 18;

// Outputs smaller than this are likely to be read again from the cache they are written to.
constexpr std::int64_t kPastCacheBytes = 4 << 20;

// Whether out[p] is one of the rows.
bool in_place(const RowTable& rows, std::int64_t p, std::uintptr_t out) {
  for (int k = 0; k < rows.num_tasks; ++k)
    if (rows.pointers[k * rows.num_params + p] == out) return true;
  return false;
}

}  // namespace

void combine(const RowTable& rows, const double* weights, const Outputs& out, int threads) {
  std::vector<char> past_cache(rows.num_params);
  std::int64_t columns = 0, bytes = 0;
  for (std::int64_t p = 0; p < rows.num_params; ++p) {
    past_cache[p] = !out.accumulate && out.pointers[p] != 0 && !in_place(rows, p, out.pointers[p]);
    columns += rows.numels[p];
    bytes += rows.numels[p] * item_size(out.dtypes[p]);
  }
  if (bytes < kPastCacheBytes) past_cache.assign(rows.num_params, 0);

  const Kernels& isa = kernels();
  const std::int64_t chunks = columns * rows.num_tasks / kMinElements;
  const ChunkPlan plan = plan_chunks(rows, kAlignment, chunks > 1 ? columns / chunks : columns, kMaxChunks);
  parallel_for(static_cast<std::int64_t>(plan.chunks.size()), threads, [&](std::int64_t i) {
    const Chunk& chunk = plan.chunks[i];
    const double* w = weights + static_cast<std::int64_t>(chunk.group) * rows.num_tasks;
    for (std::int64_t s = chunk.first_segment; s < chunk.first_segment + chunk.num_segments; ++s) {
      const Segment& segment = plan.segments[s];
      const std::int64_t p = segment.param;
      if (out.pointers[p] == 0) continue;
      isa.combine_segment(
          rows, segment, w,
          {reinterpret_cast<void*>(out.pointers[p]), out.dtypes[p], out.accumulate, past_cache[p] != 0});
    }
  });
}

}  // namespace mtl::cpu
