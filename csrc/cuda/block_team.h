#pragma once

// The threads of a block as the team of a solver. A block is a whole number of warps, at most kMaxWarps.

#include "device.h"
#include "mtl_kernels/team.h"

namespace mtl::cuda {

class BlockTeam {
 public:
  static constexpr int kMaxWarps = 16;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }

  // Every thread adds in the same order, so that all of them hold the same bits. Functions of their own: a
  // solver calls them dozens of times, and every gram kernel holds every solver.
  __device__ __noinline__ double sum(double x) const {
    return reduce(x, [](double a, double b) { return a + b; });
  }
  __device__ __noinline__ double min(double x) const {
    return reduce(x, [](double a, double b) { return b < a ? b : a; });
  }
  __device__ __noinline__ IndexedValue argmin(double value, int index) const {
    return reduce(IndexedValue{value, index}, [](IndexedValue a, IndexedValue b) { return lesser(a, b); });
  }
  __device__ bool any(bool x) const { return __syncthreads_or(x) != 0; }

 private:
  __device__ static double from_lane(double x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }
  __device__ static IndexedValue from_lane(IndexedValue x, int offset) {
    return {__shfl_xor_sync(kAllLanes, x.value, offset), __shfl_xor_sync(kAllLanes, x.index, offset)};
  }

  // Lanes, then warps, in index order. The first barrier also ends the use of `parts` by the reduction
  // before.
  template <class T, class Join>
  __device__ static T reduce(T x, Join join) {
    __shared__ T parts[kMaxWarps];
    for (int offset = 1; offset < kWarp; offset *= 2) x = join(x, from_lane(x, offset));
    __syncthreads();
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
    __syncthreads();
    T total = parts[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total = join(total, parts[warp]);
    return total;
  }
};

}  // namespace mtl::cuda
