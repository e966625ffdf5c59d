#pragma once

// What follows when a block has written the sums of its slice, `width` of them. The last slice of a pod adds
// up the pod, the last pod of a group the group, always in the order of their numbers: who comes last changes
// nothing. A group of few slices is a single pod; for more, two levels keep the last block from reading the
// sums of every other block.

#include "device.h"
#include "meeting.h"
#include "ptx.h"

namespace mtl::cuda {

// Whether this block is the last of `expected` to come here. What the others wrote before is then visible.
// One thread arrives for all: a barrier lies between what the block wrote and this call, and another one
// carries to all threads what the others had written.
__device__ inline bool arrives_last(unsigned* arrivals, std::int64_t expected) {
  if (expected == 1) return true;
  bool last = false;
  if (threadIdx.x == 0) {
    last = arrive(arrivals) + 1 == static_cast<unsigned>(expected);
    if (last) *arrivals = 0;
  }
  return __syncthreads_or(last) != 0;
}

// Adds up `count` rows of sums, one by one and in their order, and calls `use(number, total)` in one
// thread for each. They come from other blocks, so past L1. What takes time is waiting for L2, so a thread
// has several loads in flight: of kAtOnce numbers, and of as many rows as make 16.
template <int kAtOnce, class Use>
__device__ __forceinline__ void add_in_order(const double* sums, std::int64_t count, int width, Use use) {
  constexpr int kRows = 16 / kAtOnce;
  const int threads = static_cast<int>(blockDim.x);
  for (int first = static_cast<int>(threadIdx.x); first < width; first += kAtOnce * threads) {
    double totals[kAtOnce] = {};
#pragma unroll 1
    for (std::int64_t row = 0; row < count; row += kRows) {
      const double* at = sums + row * width + first;
      const int rows = count - row < kRows ? static_cast<int>(count - row) : kRows;
      double found[kRows][kAtOnce];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          found[i][n] =
              i < rows && first + n * threads < width ? __ldcg(at + (i * width + n * threads)) : 0.0;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) totals[n] += found[i][n];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (first + n * threads < width) use(first + n * threads, totals[n]);
  }
}

// All threads call it, with a barrier behind what they have written. In the block that completes the group of
// the slice it calls `use(number, total)`, as `add_in_order`, and is true.
template <int kAtOnce, class Use>
__device__ __forceinline__ bool completes_group(const Meeting& meeting, const Slice& slice, int width,
                                                Use use) {
  if (!arrives_last(meeting.pod_arrivals + slice.pod, slice.pod_slices)) return false;
  const GroupPods& group = meeting.groups[slice.group];
  const double* sums = meeting.slice_sums + slice.first_of_pod * width;
  std::int64_t count = slice.pod_slices;
  if (group.num_pods > 1) {
    double* pod_sum = meeting.pod_sums + slice.pod * width;
    add_in_order<kAtOnce>(sums, count, width, [&](int number, double total) { pod_sum[number] = total; });
    __syncthreads();
    if (!arrives_last(meeting.group_arrivals + slice.group, group.num_pods)) return false;
    sums = meeting.pod_sums + group.first_pod * width;
    count = group.num_pods;
  }
  add_in_order<kAtOnce>(sums, count, width, use);
  return true;
}

}  // namespace mtl::cuda
