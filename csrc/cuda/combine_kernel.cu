// combine: out = scale * sum_k w_k row_k, one pass over the rows, summed in double and rounded once.
//
// A thread loads 16 bytes of eight rows at a time, adds them up, and writes its columns when it has seen all
// rows: so the output may be one of the rows. Tiles are taken in falling order, the reverse of gram's,
// because what gram read last is what the L2 cache still holds.
#include <cfloat>

#include "combine_kernels.h"
#include "elements.h"
#include "mtl_kernels/rows.h"

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

template <class Out>
__device__ __forceinline__ Out finished(double sum, bool accumulate, Out before, bool* finite) {
  const Out value = from_double<Out>(accumulate ? sum + to_double(before) : sum);
  *finite = *finite && fabs(to_double(value)) <= DBL_MAX;
  return value;
}

// One tile, of rows and output that begin at `begin`.
template <class In, class Out>
struct Combination {
  static constexpr int kElements = Vector<In>::kElements, kStep = kThreads * kElements;

  const Operands& operands;
  int num_tasks;
  bool accumulate;
  std::int64_t begin;
  Out* out;

  // Adds the weighted rows up, kRows of them at a time in each of kSteps steps. `load(row, step)` reads what
  // this thread takes of one, given its address, or 0.
  template <int kRows, int kSteps, class Load>
  __device__ __forceinline__ void add_rows(Load load, double (&sums)[kSteps][kElements]) const {
#pragma unroll 1
    for (int first = 0; first < num_tasks; first += kRows) {
      Vector<In> loaded[kSteps][kRows];
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          const std::uintptr_t row = first + k < num_tasks ? operands.rows[first + k] : 0;
          loaded[step][k] = load(row == 0 ? 0 : row + begin * static_cast<int>(sizeof(In)), step);
        }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (first + k >= num_tasks || operands.rows[first + k] == 0) continue;
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int c = 0; c < kElements; ++c)
            sums[step][c] += operands.weights[first + k] * loaded[step][k].exact(c);
      }
    }
  }

  __device__ __forceinline__ void write_vector(int column, const double (&sums)[kElements],
                                               bool* finite) const {
    using Outs = Pack<Out, kElements>;
    Outs* to = reinterpret_cast<Outs*>(out + begin + column);
    Outs outs;
    if (accumulate) outs = *to;
#pragma unroll
    for (int c = 0; c < kElements; ++c)
      outs.at[c] = finished<Out>(sums[c], accumulate, accumulate ? outs.at[c] : Out{}, finite);
    *to = outs;
  }

  // The columns before `whole`. Enough bytes in flight for few rows too.
  template <int kRows, int kSteps>
  __device__ __forceinline__ void take_vectors(int whole, bool* finite) const {
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x) * kElements; column < whole; column += kSteps * kStep) {
      double sums[kSteps][kElements] = {};
      add_rows<kRows, kSteps>(
          [&](std::uintptr_t row, int step) {
            return load_vector<In>(column + step * kStep < whole ? row : 0, column + step * kStep);
          },
          sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        if (column + step * kStep < whole) write_vector(column + step * kStep, sums[step], finite);
    }
  }

  // The columns from `whole` to `end`, which no vector holds.
  __device__ __forceinline__ void take_rest(int whole, int end, bool* finite) const {
#pragma unroll 1
    for (int column = whole + static_cast<int>(threadIdx.x); column < end; column += kStep) {
      double sums[1][kElements] = {};
      add_rows<kRowsAtATime, 1>(
          [&](std::uintptr_t row, int) { return gather_elements<In>(row, column, kThreads, end); }, sums);
#pragma unroll
      for (int c = 0; c < kElements; ++c) {
        Out* to = out + begin + column + c * kThreads;
        if (column + c * kThreads < end)
          *to = finished<Out>(sums[0][c], accumulate, accumulate ? *to : Out{}, finite);
      }
    }
  }

  __device__ __forceinline__ void take(int columns, bool aligned, bool* finite) const {
    const int whole = aligned ? columns / kElements * kElements : 0;
    if constexpr (std::is_same_v<In, Out>) {  // what is nearly always the case
      if (num_tasks <= kRowsAtATime / 2) {
        take_vectors<kRowsAtATime / 2, 2>(whole, finite);
      } else {
        take_vectors<kRowsAtATime, 1>(whole, finite);
      }
    } else {
      take_vectors<kRowsAtATime, 1>(whole, finite);
    }
    take_rest(whole, columns, finite);
  }
};

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 2) combine_rows(const __grid_constant__ CombineArgs args) {
  __shared__ Operands operands;
  bool finite = true;
  for (std::int64_t n = blockIdx.x; n < args.num_slices; n += gridDim.x) {
    const Slice slice = args.slices[args.first_slice + n];
    // The last tile of the slice, and from there backwards.
    std::int64_t number = slice.first_tile;
    if (number >= slice.end_tile) continue;
    number += (slice.end_tile - 1 - number) / slice.stride * slice.stride;
    int param = -1;
    bool aligned = false;
    Out* out = nullptr;
    for (; number >= slice.first_tile; number -= slice.stride) {
      const Tile tile = args.tiles[number];
      if (tile.param != param) {
        param = tile.param;
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
      Combination<In, Out>{operands, args.num_tasks, args.accumulate, tile.begin, out}.take(tile.columns,
                                                                                            aligned, &finite);
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
