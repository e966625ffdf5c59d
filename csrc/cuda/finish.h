#pragma once

// What follows when a block has written the sums of its slice. The last slice of a pod adds up the pod, the
// last pod of a group the group, always in the order of their numbers: who comes last changes nothing. The
// block that completes a group writes its Gram matrix and goes on to the norms, the cosines and the solver,
// so that nothing is left for another launch. Two levels keep the last block from reading the sums of every
// other block.

#include "device.h"
#include "gram_args.h"
#include "run_solver.h"

namespace mtl::cuda {

// Whether this block is the last of `expected` to come here. What the others wrote before is then visible.
__device__ inline bool arrives_last(unsigned* arrivals, std::int64_t expected) {
  __shared__ unsigned before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrivals, 1u);
  __syncthreads();
  const bool last = before + 1 == static_cast<unsigned>(expected);
  __syncthreads();
  if (!last) return false;
  if (threadIdx.x == 0) *arrivals = 0;
  __threadfence();
  return true;
}

// The sum of pair `pair` over `count` rows of sums. They come from other blocks, so past L1.
__device__ inline double ordered_sum(const double* sums, std::int64_t count, int pairs, int pair) {
  double total = 0.0;
#pragma unroll 8
  for (std::int64_t i = 0; i < count; ++i) total += __ldcg(sums + i * pairs + pair);
  return total;
}

// The pair (i, j <= i) of a position in the triangle.
__device__ inline void pair_at(int position, int* i, int* j) {
  int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(position) + 1.0f) - 1.0f) * 0.5f);
  while (num_pairs(row) > position) --row;
  while (num_pairs(row + 1) <= position) ++row;
  *i = row;
  *j = position - num_pairs(row);
}

__device__ inline double unit(double length) { return length > 0.0 ? 1.0 / length : 0.0; }

__device__ inline double clamp_cosine(double x) { return x > 1.0 ? 1.0 : x < -1.0 ? -1.0 : x; }

__device__ inline void write_statistics(const GramArgs& args, std::int64_t group) {
  const int K = args.num_tasks;
  const double* gram = args.gram + group * K * K;
  double* norms = args.norms + group * K;
  for (int k = static_cast<int>(threadIdx.x); k < K; k += static_cast<int>(blockDim.x)) {
    const double square = gram[k * K + k];
    norms[k] = square < 0.0 ? 0.0 : sqrt(square);
  }
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < K * K; n += static_cast<int>(blockDim.x)) {
    const int i = n / K > n % K ? n / K : n % K;  // the lower triangle speaks for both
    const int j = n / K + n % K - i;
    const double length = norms[i];
    double cosine = clamp_cosine(gram[i * K + j] * unit(norms[i]) * unit(norms[j]));
    if (i == j) cosine = length == 0.0 ? 0.0 : length / length;
    args.cosines[group * K * K + n] = cosine;
  }
}

static __device__ __noinline__ void finish(const GramArgs& args, std::int64_t slice_number) {
  const Slice& slice = args.slices[slice_number];
  const Pod& pod = args.pods[slice.pod];
  const int pairs = num_pairs(args.num_tasks);
  if (!arrives_last(args.pod_arrivals + slice.pod, pod.num_slices)) return;
  const GroupPods& group = args.groups[slice.group];
  const double* sums = args.slice_sums + pod.first_slice * pairs;
  std::int64_t count = pod.num_slices;
  if (group.num_pods > 1) {
    double* pod_sum = args.pod_sums + slice.pod * pairs;
    for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += static_cast<int>(blockDim.x))
      pod_sum[pair] = ordered_sum(sums, count, pairs, pair);
    if (!arrives_last(args.group_arrivals + slice.group, group.num_pods)) return;
    sums = args.pod_sums + group.first_pod * pairs;
    count = group.num_pods;
  }
  const int K = args.num_tasks;
  double* gram = args.gram + slice.group * K * K;
  for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += static_cast<int>(blockDim.x)) {
    int i, j;
    pair_at(pair, &i, &j);
    gram[i * K + j] = gram[j * K + i] = ordered_sum(sums, count, pairs, pair);
  }
  __syncthreads();
  if (args.norms != nullptr) write_statistics(args, slice.group);
  if (args.solver.solver < 0) return;
  solve_problem(args.solver, slice.group);
  if (args.solver.advance_rng && arrives_last(args.arrivals, args.num_groups) && threadIdx.x == 0)
    args.solver.rng[1] += 1;
}

}  // namespace mtl::cuda
