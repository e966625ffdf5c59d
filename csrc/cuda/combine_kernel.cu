// combine: out = scale * sum_k w_k row_k, one pass over the rows, summed in double and rounded once.
//
// A thread loads 16 bytes of eight rows at a time, adds them up, and writes its columns when it has seen all
// rows: so the output may be one of the rows. Tiles are taken in falling order, the reverse of gram's,
// because what gram read last is what the L2 cache still holds.
#include <cfloat>

#include "combine_kernels.h"
#include "elements.h"
#include "mtl_kernels/rows.h"
#include "walk.h"

namespace mtl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtATime = 8;

template <class Out, int kCount>
struct alignas(sizeof(Out) * kCount < 16 ? sizeof(Out) * kCount : 16) Pack {
  Out at[kCount];
};

// What all threads of a block share for the span at hand.
struct Operands {
  std::uintptr_t rows[kMaxTasks];
  double weights[kMaxTasks];
};

template <class In>
__device__ __forceinline__ void add_rows(const Operands& operands, int num_tasks, std::int64_t column,
                                         double (&sums)[Vector<In>::kElements]) {
#pragma unroll 1
  for (int first = 0; first < num_tasks; first += kRowsAtATime) {
    Vector<In> loaded[kRowsAtATime];
#pragma unroll
    for (int k = 0; k < kRowsAtATime; ++k)
      loaded[k] = load_vector<In>(first + k < num_tasks ? operands.rows[first + k] : 0, column);
#pragma unroll
    for (int k = 0; k < kRowsAtATime; ++k) {
      if (first + k >= num_tasks || operands.rows[first + k] == 0) continue;
#pragma unroll
      for (int c = 0; c < Vector<In>::kElements; ++c)
        sums[c] += operands.weights[first + k] * loaded[k].exact(c);
    }
  }
}

template <class In>
__device__ __forceinline__ double add_elements(const Operands& operands, int num_tasks, std::int64_t column) {
  double sum = 0.0;
  for (int k = 0; k < num_tasks; ++k)
    if (operands.rows[k] != 0) sum += operands.weights[k] * load_element<In>(operands.rows[k], column);
  return sum;
}

template <class Out>
__device__ __forceinline__ Out finished(double sum, bool accumulate, Out before, bool* finite) {
  const Out value = from_double<Out>(accumulate ? sum + to_double(before) : sum);
  *finite = *finite && fabs(to_double(value)) <= DBL_MAX;
  return value;
}

template <class In, class Out>
__device__ __forceinline__ void combine_tile(const CombineArgs& args, const Operands& operands, Out* out,
                                             bool aligned, std::int64_t begin, std::int64_t end,
                                             bool* finite) {
  constexpr int kElements = Vector<In>::kElements;
  using Outs = Pack<Out, kElements>;
  const std::int64_t whole = begin + (aligned ? (end - begin) / kElements * kElements : 0);
  for (std::int64_t column = begin + static_cast<std::int64_t>(threadIdx.x) * kElements; column < whole;
       column += kThreads * kElements) {
    double sums[kElements] = {};
    add_rows<In>(operands, args.num_tasks, column, sums);
    Outs* to = reinterpret_cast<Outs*>(out + column);
    Outs outs;
    if (args.accumulate) outs = *to;
#pragma unroll
    for (int c = 0; c < kElements; ++c)
      outs.at[c] = finished<Out>(sums[c], args.accumulate, args.accumulate ? outs.at[c] : Out{}, finite);
    *to = outs;
  }
  for (std::int64_t column = whole + threadIdx.x; column < end; column += kThreads) {
    const double sum = add_elements<In>(operands, args.num_tasks, column);
    out[column] = finished<Out>(sum, args.accumulate, args.accumulate ? out[column] : Out{}, finite);
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 2) combine_rows(const __grid_constant__ CombineArgs args) {
  __shared__ Operands operands;
  bool finite = true;
  for (std::int64_t n = blockIdx.x; n < args.num_slices; n += gridDim.x) {
    const Slice slice = args.slices[args.first_slice + n];
    // The last tile of the slice, and from there backwards.
    std::int64_t tile = slice.first_tile;
    if (tile >= slice.num_tiles) continue;
    tile += (slice.num_tiles - 1 - tile) / slice.stride * slice.stride;
    const int num_spans = static_cast<int>(slice.num_spans);
    Walk walk(args.spans + slice.first_span, num_spans, -1);
    bool aligned = false;
    Out* out = nullptr;
    for (; tile >= 0; tile -= slice.stride) {
      if (walk.seek(tile)) {
        const std::int64_t param = walk.span().param;
        __syncthreads();
        for (int k = static_cast<int>(threadIdx.x); k < args.num_tasks; k += kThreads) {
          operands.rows[k] = args.pointers[k * args.num_params + param];
          operands.weights[k] =
              args.weights[slice.group * args.num_tasks + k] * (args.scale == nullptr ? 1.0 : *args.scale);
        }
        __syncthreads();
        out = static_cast<Out*>(global_memory(args.outputs[param]));
        std::uintptr_t any = args.outputs[param];
        for (int k = 0; k < args.num_tasks; ++k) any |= operands.rows[k];
        aligned = any % 16 == 0;
      }
      const std::int64_t begin = (tile - walk.span().first_tile) * args.tile_columns;
      const std::int64_t left = walk.span().columns - begin;
      combine_tile<In, Out>(args, operands, out, aligned, begin,
                            begin + (left < args.tile_columns ? left : args.tile_columns), &finite);
    }
  }
  if (args.found_inf != nullptr && __syncthreads_or(!finite) != 0 && threadIdx.x == 0)
    atomicExch(args.found_inf, 1.0f);
}

template <class In, class Out>
CombineKernel kernel() {
  return {combine_rows<In, Out>, kThreads, kThreads * Vector<In>::kElements, 8};
}

}  // namespace

CombineKernel combine_kernel(DType rows, DType output) {
  return with_element(rows, [&](auto in) {
    return with_element(output, [](auto out) { return kernel<decltype(in), decltype(out)>(); });
  });
}

}  // namespace mtl::cuda
