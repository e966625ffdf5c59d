// The plan that cuts the columns of a row table into chunks. Host code; nothing here depends on how a chunk
// is executed.
#pragma once

#include <cstdint>
#include <vector>

#include "mtl_kernels/rows.h"

namespace mtl {

struct ChunkPlan {
  std::vector<Segment> segments;
  std::vector<Chunk> chunks;
};

// Cuts all columns into at most about `max_chunks` chunks of at least `min_columns` columns. Chunk borders
// inside a parameter are multiples of `alignment` columns. The plan depends on the sizes alone, never on the
// number of threads, so that sums taken chunk by chunk in index order are the same on every machine.
inline ChunkPlan plan_chunks(const RowTable& rows, std::int64_t alignment, std::int64_t min_columns,
                             std::int64_t max_chunks) {
  std::int64_t total = 0;
  for (std::int64_t p = 0; p < rows.num_params; ++p) total += rows.numels[p];
  std::int64_t target = (total + max_chunks - 1) / max_chunks;
  if (target < min_columns) target = min_columns;
  target = (target + alignment - 1) / alignment * alignment;

  ChunkPlan plan;
  std::int64_t room = 0;
  for (std::int64_t p = 0; p < rows.num_params; ++p) {
    for (std::int64_t begin = 0; begin < rows.numels[p];) {
      if (room <= 0 || plan.chunks.back().group != rows.groups[p]) {
        plan.chunks.push_back({static_cast<std::int64_t>(plan.segments.size()), 0, rows.groups[p]});
        room = target;
      }
      const std::int64_t left = rows.numels[p] - begin;
      std::int64_t length = left;
      if (left > room) length = (room + alignment - 1) / alignment * alignment;
      if (length > left) length = left;
      plan.segments.push_back({p, begin, length});
      plan.chunks.back().num_segments += 1;
      begin += length;
      room -= length;
    }
  }
  return plan;
}

}  // namespace mtl
