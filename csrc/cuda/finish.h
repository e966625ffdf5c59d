#pragma once

// What follows when a block has written the sums of its slice: the block that completes a group writes its
// Gram matrix and goes on to the norms, the cosines and the solver, so that nothing is left for another
// launch.

#include "device.h"
#include "gram_args.h"
#include "pods.h"
#include "run_solver.h"

namespace mtl::cuda {

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
  const int K = args.num_tasks;
  double* gram = args.gram + slice.group * K * K;
  const bool last = completes_group<kAtOnce>(args.meeting, slice, num_pairs(K), [&](int pair, double total) {
    int i, j;
    pair_at(pair, &i, &j);
    gram[i * K + j] = gram[j * K + i] = total;
  });
  if (!last) return;
  __syncthreads();
  if (args.norms != nullptr) write_statistics<kMostTasks>(args, slice.group);
  if (args.solver.solver < 0) return;
  solve_switch<kMostTasks>(args.solver.solver, problem_of(args.solver, slice.group), FusedSolvers{});
  if (args.solver.advance_rng && arrives_last(args.arrivals, args.num_groups) && threadIdx.x == 0)
    args.solver.rng[1] += 1;
}

}  // namespace mtl::cuda
