// The kernels of one instruction set: what one thread does with one chunk of columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mtl_kernels/elementwise.h"
#include "mtl_kernels/rows.h"

namespace mtl::cpu {

constexpr std::size_t kCacheLine = 64;

// Where the combination of one parameter goes.
struct Target {
  void* out;
  DType dtype;
  bool accumulate;  // add to what is there
  bool past_cache;  // store around the caches; neither where out is one of the rows nor to accumulate
};

// Elements side by side in memory.
struct Elements {
  std::uintptr_t address;
  DType dtype;
};

struct Kernels {
  const char* name;

  // Doubles of scratch that gram_chunk needs for K tasks.
  std::size_t (*gram_scratch)(int num_tasks);
  // Writes the K (K + 1) / 2 products of the rows over the chunk's columns to `partial`, row by row of the
  // lower triangle. `in_float` allows sums of up to 32 products in float. `scratch` is aligned to a cache
  // line.
  void (*gram_chunk)(const RowTable& rows, const Segment* segments, std::int64_t num_segments, bool in_float,
                     double* scratch, double* partial);
  // Writes or adds sum_k weights[k] * row k over the segment's columns to the target.
  void (*combine_segment)(const RowTable& rows, const Segment& segment, const double* weights,
                          const Target& target);

  // Doubles of scratch that reduce_segment needs for K tasks.
  std::size_t (*reduce_scratch)(int num_tasks);
  // Writes what the call makes of each column of the segment to `out`, of the dtype of the rows. `first`: the
  // number of the parameter's first element among all. `scratch` is aligned to a cache line.
  void (*reduce_segment)(const RowTable& rows, const Segment& segment, const ColumnCall& call,
                         std::int64_t first, std::uintptr_t out, double* scratch);
  // Updates elements [begin, begin + length) of a state; returns the sum of what comes of it. A row at
  // address 0 is read as zeros.
  double (*update_segment)(const Elements& row, const Elements& state, std::int64_t begin,
                           std::int64_t length, const StateCall& call, std::int64_t place);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// The kernels in use: the best set this processor has, or the one named by MTL_KERNELS_ISA.
const Kernels& kernels();
// Switches to another set; false if it is unknown or the processor lacks it.
bool use_isa(const char* name);

}  // namespace mtl::cpu
