// The K x P table of row pointers, and the pieces its columns are cut into.
//
// A row is the gradient of one task: P pieces of memory, one per parameter, or a null pointer where the task
// does not reach that parameter. Nothing here owns memory.
#pragma once

#include <cstdint>

namespace mtl {

constexpr int kMaxTasks = 128;

enum class DType : std::int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr std::int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct RowTable {
  int num_tasks;                   // K
  std::int64_t num_params;         // P
  const std::uintptr_t* pointers;  // [K, P], 0 = the task does not reach the parameter
  const std::int64_t* numels;      // [P]
  const DType* dtypes;             // [P], one dtype per parameter, shared by all tasks
  const std::int32_t* groups;      // [P], which Gram matrix the parameter belongs to
};

// Columns [begin, begin + length) of one parameter.
struct Segment {
  std::int64_t param;
  std::int64_t begin;
  std::int64_t length;
};

// A run of segments of one group: the unit of parallel work and of ordered reduction.
struct Chunk {
  std::int64_t first_segment;
  std::int64_t num_segments;
  std::int32_t group;
};

}  // namespace mtl
