#pragma once

// Absent rows beside rows that are not finite. The kernels read an absent row as zeros, and zero times
// infinity is not zero; but what does not exist adds nothing, whatever the others hold.

#include <cfloat>

#include "elements.h"
#include "gram_args.h"
#include "teams.h"

namespace mtl::cuda {

// Whether some row is absent from some tile of the slice.
__device__ inline bool has_absent_rows(const GramArgs& args, const Slice& slice) {
  bool absent = false;
  for (std::int64_t tile = slice.first_tile; tile < slice.end_tile; tile += slice.stride) {
    const std::int64_t param = args.tiles[tile].param;
    for (int k = static_cast<int>(threadIdx.x); k < args.num_tasks; k += static_cast<int>(blockDim.x))
      absent = absent || args.pointers[k * args.num_params + param] == 0;
  }
  return __syncthreads_or(absent) != 0;
}

// The sum of one pair over the slice, without what one of the two rows lacks.
template <class T>
__device__ __noinline__ double pair_sum(const GramArgs& args, const Slice& slice, int i, int j) {
  double sum = 0.0;
  for (std::int64_t number = slice.first_tile; number < slice.end_tile; number += slice.stride) {
    const Tile tile = args.tiles[number];
    const std::uintptr_t a = args.pointers[i * args.num_params + tile.param];
    const std::uintptr_t b = args.pointers[j * args.num_params + tile.param];
    if (a == 0 || b == 0) continue;
    const std::int64_t end = tile.begin + tile.columns;
    for (std::int64_t column = tile.begin + threadIdx.x; column < end; column += blockDim.x)
      sum += to_double(*element_at<T>(a, column)) * to_double(*element_at<T>(b, column));
  }
  return BlockTeam{}.sum(sum);
}

// Takes the pairs of a slice again whose sums are not finite, if an absent row may be why: rare, so slow is
// fine. Every thread of the block calls it when it has written its share of `sums`, with whether all of those
// are finite; when it returns, the block's writes lie behind a barrier.
template <class T>
__device__ __noinline__ void mend_absent_rows(const GramArgs& args, std::int64_t slice_number, bool finite,
                                              double* sums) {
  const Slice& slice = args.slices[slice_number];
  if (__syncthreads_and(finite) != 0 || !has_absent_rows(args, slice)) return;
  for (int i = 0; i < args.num_tasks; ++i) {
    for (int j = 0; j <= i; ++j) {
      double* place = sums + num_pairs(i) + j;
      if (fabs(*place) <= DBL_MAX) continue;
      const double total = pair_sum<T>(args, slice, i, j);  // all have read the old one when it returns
      if (threadIdx.x == 0) *place = total;
    }
  }
  __syncthreads();
}

}  // namespace mtl::cuda
