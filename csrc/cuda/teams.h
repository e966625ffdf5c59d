#pragma once

// The threads of a block as the team of a solver, all of them or one warp. A block is a whole number of
// warps, at most kMaxWarps; a squad is a warp.

#include "device.h"
#include "mtl_kernels/team.h"
#include "ptx.h"

namespace mtl::cuda {

namespace detail {

__device__ inline double from_lane_xor(double x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }
__device__ inline IndexedValue from_lane_xor(IndexedValue x, int offset) {
  return {__shfl_xor_sync(kAllLanes, x.value, offset), __shfl_xor_sync(kAllLanes, x.index, offset)};
}

// Over the lanes of a warp; all of them get the same bits, as `join` does not care for the order of two.
template <class T, class Join>
__device__ T join_lanes(T x, Join join) {
  for (int offset = 1; offset < kWarp; offset *= 2) x = join(x, from_lane_xor(x, offset));
  return x;
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Min {
  __device__ double operator()(double a, double b) const { return b < a ? b : a; }
};
struct Lesser {
  __device__ IndexedValue operator()(IndexedValue a, IndexedValue b) const { return lesser(a, b); }
};

// What both teams have: their reductions, and warps as squads.
template <class Team>
class TeamOfWarps {
 public:
  static constexpr int kLanes = kWarp;
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ double from_lane(double x, int lane) const { return __shfl_sync(kAllLanes, x, lane); }
  __device__ unsigned least(unsigned x) const { return __reduce_min_sync(kAllLanes, x); }

  // Functions of their own: a solver calls them dozens of times, and every gram kernel holds every solver.
  __device__ __noinline__ double sum(double x) const { return Team::reduce(x, Sum{}); }
  __device__ __noinline__ double min(double x) const { return Team::reduce(x, Min{}); }
  __device__ __noinline__ IndexedValue argmin(double value, int index) const {
    return Team::reduce(IndexedValue{value, index}, Lesser{});
  }
};

}  // namespace detail

// One warp: the first of a block, because its barriers cost a tenth of the block's, and up to 32 tasks give
// the other warps nothing to do but wait; or each of them as a squad.
class WarpTeam : public detail::TeamOfWarps<WarpTeam> {
 public:
  __device__ int rank() const { return lane(); }
  // Loops over ranks go round once; unrolled, they would only take registers from the kernel.
  __device__ int size() const { return opaque(kWarp); }
  __device__ int squad() const { return 0; }
  __device__ int num_squads() const { return 1; }
  __device__ WarpTeam as_team() const { return {}; }
  __device__ void sync() const { __syncwarp(); }
  __device__ bool any(bool x) const {
    __syncwarp();
    return __any_sync(kAllLanes, x) != 0;
  }

 private:
  friend TeamOfWarps;

  // A shuffle alone orders no memory, which a collective of a team does.
  template <class T, class Join>
  __device__ static T reduce(T x, Join join) {
    __syncwarp();
    return detail::join_lanes(x, join);
  }
};

class BlockTeam : public detail::TeamOfWarps<BlockTeam> {
 public:
  static constexpr int kMaxWarps = 16;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ int squad() const { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ int num_squads() const { return static_cast<int>(blockDim.x) / kWarp; }
  __device__ WarpTeam as_team() const { return {}; }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool x) const { return __syncthreads_or(x) != 0; }

 private:
  friend TeamOfWarps;

  // Lanes, then warps, in index order: every thread adds in the same one, so that all of them hold the same
  // bits. The first barrier also ends the use of `parts` by the reduction before.
  template <class T, class Join>
  __device__ static T reduce(T x, Join join) {
    __shared__ T parts[kMaxWarps];
    x = detail::join_lanes(x, join);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
    __syncthreads();
    T total = parts[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total = join(total, parts[warp]);
    return total;
  }
};

}  // namespace mtl::cuda
