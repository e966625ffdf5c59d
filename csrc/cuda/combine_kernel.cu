// combine: out = scale * sum_k w_k row_k, one pass over the rows, rounded once. Sums are kept in double;
// where that is slow, those of shorter elements in float.
#include "columns.h"
#include "combine_kernels.h"

namespace mtl::cuda {
namespace {

template <class Sum>
struct WeightedSum {
  using Number = Sum;
  using Weight = Sum;
  using Column = Sum;
  static constexpr int kRows = kRowsAtATime;
  static constexpr bool kWeighted = true, kEpilogues = true;

  static __device__ __forceinline__ void add(Sum& sum, Sum weight, Sum value) { sum += weight * value; }
  template <int kCount>
  __device__ __forceinline__ void results(const Sum (&sums)[kCount], std::int64_t, int,
                                          Sum (&numbers)[kCount]) const {
#pragma unroll
    for (int c = 0; c < kCount; ++c) numbers[c] = sums[c];
  }
};

template <class In, class Out, class Sum>
__global__ void __launch_bounds__(kColumnThreads, 2) combine_rows(const __grid_constant__ CombineArgs args) {
  __shared__ Operands<Sum> operands;
  bool finite = true;
  for_each_tile<true>(args, &operands, [&](const Tile& tile, std::uintptr_t out) {
    ColumnTile<In, Out, WeightedSum<Sum>>{operands,   {},  args.accumulate, args.found_inf != nullptr,
                                          tile.begin, out, &finite}
        .take(tile.columns);
  });
  if (args.found_inf != nullptr && __syncthreads_or(!finite) != 0 && threadIdx.x == 0)
    atomicExch(args.found_inf, 1.0f);
}

template <class In, class Out, class Sum>
CombineKernel kernel() {
  return {combine_rows<In, Out, Sum>, kColumnThreads, kColumnThreads * Vector<In>::kElements, 8};
}

template <class In, class Out>
CombineKernel kernel_for(bool slow_double) {
  if constexpr (sizeof(In) < 8 && sizeof(Out) < 8) {
    if (slow_double) return kernel<In, Out, float>();
  }
  return kernel<In, Out, double>();
}

}  // namespace

CombineKernel combine_kernel(DType rows, DType output, bool slow_double) {
  return with_element(rows, [&](auto in) {
    return with_element(output,
                        [&](auto out) { return kernel_for<decltype(in), decltype(out)>(slow_double); });
  });
}

}  // namespace mtl::cuda
