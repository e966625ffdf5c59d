#pragma once

// What follows when a block has written the sums of its slice. The last slice of a pod adds up the pod, the
// last pod of a group the group, always in the order of their numbers: who comes last changes nothing. The
// block that completes a group writes its Gram matrix and goes on to the norms, the cosines and the solver,
// so that nothing is left for another launch. A group of few slices is a single pod; for more, two levels
// keep the last block from reading the sums of every other block.

#include "device.h"
#include "gram_args.h"
#include "run_solver.h"

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

// Adds up `count` rows of sums, pair by pair and in their order, and calls `use(pair, total)` in one thread
// for each. They come from other blocks, so past L1. What takes time is waiting for L2, so a thread has
// several loads in flight: of kAtOnce pairs, and of as many rows as make 16.
template <int kAtOnce, class Use>
__device__ __forceinline__ void add_in_order(const double* sums, std::int64_t count, int pairs, Use use) {
  constexpr int kRows = 16 / kAtOnce;
  const int threads = static_cast<int>(blockDim.x);
  for (int first = static_cast<int>(threadIdx.x); first < pairs; first += kAtOnce * threads) {
    double totals[kAtOnce] = {};
#pragma unroll 1
    for (std::int64_t row = 0; row < count; row += kRows) {
      const double* at = sums + row * pairs + first;
      const int rows = count - row < kRows ? static_cast<int>(count - row) : kRows;
      double found[kRows][kAtOnce];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          found[i][n] =
              i < rows && first + n * threads < pairs ? __ldcg(at + (i * pairs + n * threads)) : 0.0;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) totals[n] += found[i][n];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (first + n * threads < pairs) use(first + n * threads, totals[n]);
  }
}

// The pair (i, j <= i) of a position in the triangle. Where row i begins, the root is 2 i + 1 to the bit.
__device__ inline void pair_at(int position, int* i, int* j) {
  const int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(position) + 1.0f) - 1.0f) * 0.5f);
  *i = row;
  *j = position - num_pairs(row);
}

__device__ inline double unit(double length) { return length > 0.0 ? 1.0 / length : 0.0; }

__device__ inline double clamp_cosine(double x) { return x > 1.0 ? 1.0 : x < -1.0 ? -1.0 : x; }

template <int kMostTasks>
__device__ inline void write_statistics(const GramArgs& args, std::int64_t group) {
  __shared__ double inverses[kMostTasks];
  const int K = args.num_tasks;
  const double* gram = args.gram + group * K * K;
  double* norms = args.norms + group * K;
  for (int k = static_cast<int>(threadIdx.x); k < K; k += static_cast<int>(blockDim.x)) {
    const double square = gram[k * K + k];
    norms[k] = square < 0.0 ? 0.0 : sqrt(square);
    inverses[k] = unit(norms[k]);
  }
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < K * K; n += static_cast<int>(blockDim.x)) {
    const int i = n / K > n % K ? n / K : n % K;  // the lower triangle speaks for both
    const int j = n / K + n % K - i;
    double cosine = clamp_cosine(gram[i * K + j] * inverses[i] * inverses[j]);
    if (i == j) cosine = norms[i] == 0.0 ? 0.0 : norms[i] / norms[i];
    args.cosines[group * K * K + n] = cosine;
  }
}

// kMostTasks: of all that this kernel is used for. All threads call it, with a barrier behind what they have
// written. Shared memory is free again when it returns.
template <int kMostTasks>
static __device__ __noinline__ void finish(const GramArgs& args, std::int64_t slice_number) {
  constexpr int kAtOnce = kMostTasks <= 16 ? 1 : 4;  // a block has more threads than that makes pairs
  const Slice& slice = args.slices[slice_number];
  const int pairs = num_pairs(args.num_tasks);
  if (!arrives_last(args.pod_arrivals + slice.pod, slice.pod_slices)) return;
  const GroupPods& group = args.groups[slice.group];
  const double* sums = args.slice_sums + slice.first_of_pod * pairs;
  std::int64_t count = slice.pod_slices;
  if (group.num_pods > 1) {
    double* pod_sum = args.pod_sums + slice.pod * pairs;
    add_in_order<kAtOnce>(sums, count, pairs, [&](int pair, double total) { pod_sum[pair] = total; });
    __syncthreads();
    if (!arrives_last(args.group_arrivals + slice.group, group.num_pods)) return;
    sums = args.pod_sums + group.first_pod * pairs;
    count = group.num_pods;
  }
  const int K = args.num_tasks;
  double* gram = args.gram + slice.group * K * K;
  add_in_order<kAtOnce>(sums, count, pairs, [&](int pair, double total) {
    int i, j;
    pair_at(pair, &i, &j);
    gram[i * K + j] = gram[j * K + i] = total;
  });
  __syncthreads();
  if (args.norms != nullptr) write_statistics<kMostTasks>(args, slice.group);
  if (args.solver.solver < 0) return;
  solve_switch<kMostTasks>(args.solver.solver, problem_of(args.solver, slice.group), FusedSolvers{});
  if (args.solver.advance_rng && arrives_last(args.arrivals, args.num_groups) && threadIdx.x == 0)
    args.solver.rng[1] += 1;
}

}  // namespace mtl::cuda
