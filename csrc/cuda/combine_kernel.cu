// combine: out = scale * sum_k w_k row_k, one pass over the rows, rounded once.
//
// A thread loads 16 bytes of eight rows at a time, adds them up, and writes its columns when it has seen all
// rows: so the output may be one of the rows. Sums are kept in double; where that is slow, those of shorter
// elements in float. Tiles are taken in falling order, the reverse of gram's, because what gram read last is
// what the L2 cache still holds.
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

// The rows that reach the parameter at hand, in the order of the tasks, for all threads of a block.
template <class Sum>
struct Operands {
  std::uintptr_t rows[kMaxTasks];
  Sum weights[kMaxTasks];
  int count;
  bool aligned;  // 16 bytes divide the addresses of rows and output
};

// All threads call it, and may read what it found when it returns.
template <class Sum>
__device__ __forceinline__ void find_operands(const CombineArgs& args, std::int64_t group, int param,
                                              Operands<Sum>* operands) {
  constexpr int kTurns = kMaxTasks / kWarp;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int lane = static_cast<int>(threadIdx.x);
    const double scale = args.scale == nullptr ? 1.0 : *args.scale;
    bool aligned = args.outputs[param] % 16 == 0;
    std::uintptr_t rows[kTurns];
    double weights[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {  // none of the loads waits for another
      const int k = turn * kWarp + lane;
      rows[turn] = row_address(args.pointers, args.num_params, args.num_tasks, k, param);
      weights[turn] = k < args.num_tasks ? args.weights[group * args.num_tasks + k] : 0.0;
    }
    int count = 0;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const unsigned there = __ballot_sync(kAllLanes, rows[turn] != 0);
      if (rows[turn] != 0) {
        const int place = count + __popc(there & ((1u << lane) - 1));
        operands->rows[place] = rows[turn];
        operands->weights[place] = static_cast<Sum>(weights[turn] * scale);
      }
      count += __popc(there);
      aligned = aligned && rows[turn] % 16 == 0;
    }
    aligned = __all_sync(kAllLanes, aligned) != 0;
    if (lane == 0) {
      operands->count = count;
      operands->aligned = aligned;
    }
  }
  __syncthreads();
}

// One tile, of rows and output that begin at `begin`.
template <class In, class Out, class Sum>
struct Combination {
  static constexpr int kElements = Vector<In>::kElements, kStep = kThreads * kElements;

  const Operands<Sum>& operands;
  bool accumulate, looks_for_inf;
  std::int64_t begin;
  std::uintptr_t out;
  bool* finite;

  // All of it in integers: over pointers that might be of any memory, the compiler does not come to an end.
  template <class T>
  static __device__ __forceinline__ std::uintptr_t address(std::uintptr_t of, std::int64_t column) {
    return of + column * static_cast<int>(sizeof(T));
  }
  __device__ __forceinline__ void* output(std::int64_t column) const {
    return global_memory(address<Out>(out, column));
  }

  // Adds the weighted rows up, kRows of them at a time in each of kSteps steps. `load(row, step)` reads what
  // this thread takes of one.
  template <int kRows, int kSteps, class Load>
  __device__ __forceinline__ void add_rows(Load load, Sum (&sums)[kSteps][kElements]) const {
    const int count = operands.count;
#pragma unroll 1
    for (int first = 0; first < count; first += kRows) {
      Vector<In> loaded[kSteps][kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k)
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          loaded[step][k] = first + k < count ? load(operands.rows[first + k], step) : Vector<In>{};
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (first + k >= count) continue;
        const Sum weight = operands.weights[first + k];
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int c = 0; c < kElements; ++c) sums[step][c] += weight * loaded[step][k].template as<Sum>(c);
      }
    }
  }

  __device__ __forceinline__ void write_vector(std::int64_t column, Sum (&sums)[kElements]) const {
    using Outs = Pack<Out, kElements>;
    auto* to = static_cast<Outs*>(output(column));
    Outs outs;
    if (accumulate) {
      outs = *to;
#pragma unroll
      for (int c = 0; c < kElements; ++c) sums[c] += to_number<Sum>(outs.at[c]);
    }
#pragma unroll
    for (int c = 0; c < kElements; ++c) outs.at[c] = rounded<Out>(sums[c]);
    if (looks_for_inf) *finite = all_finite(outs.at) && *finite;
    *to = outs;
  }

  // The columns before `whole`. Enough bytes in flight for few rows too.
  template <int kRows, int kSteps>
  __device__ __forceinline__ void take_vectors(int whole) const {
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x) * kElements; column < whole; column += kSteps * kStep) {
      Sum sums[kSteps][kElements] = {};
      const std::int64_t at = begin + column;
      add_rows<kRows, kSteps>(
          [&](std::uintptr_t row, int step) {
            return column + step * kStep < whole
                       ? load_words<In>(global_memory(address<In>(row, at + step * kStep)))
                       : Vector<In>{};
          },
          sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        if (column + step * kStep < whole) write_vector(at + step * kStep, sums[step]);
    }
  }

  // The columns from `whole` to `end`, which no vector holds.
  __device__ __forceinline__ void take_rest(int whole, int end) const {
#pragma unroll 1
    for (int column = whole + static_cast<int>(threadIdx.x); column < end; column += kStep) {
      Sum sums[1][kElements] = {};
      add_rows<kRowsAtATime, 1>(
          [&](std::uintptr_t row, int) {
            return gather_elements<In>(address<In>(row, begin), column, kThreads, end);
          },
          sums);
#pragma unroll
      for (int c = 0; c < kElements; ++c) {
        if (column + c * kThreads >= end) continue;
        auto* to = static_cast<Out*>(output(begin + column + c * kThreads));
        if (accumulate) sums[0][c] += to_number<Sum>(*to);
        const Out value[] = {rounded<Out>(sums[0][c])};
        if (looks_for_inf) *finite = all_finite(value) && *finite;
        *to = value[0];
      }
    }
  }

  __device__ __forceinline__ void take(int columns) const {
    const int whole = operands.aligned ? columns / kElements * kElements : 0;
    if constexpr (std::is_same_v<In, Out>) {  // what is nearly always the case
      if (operands.count <= kRowsAtATime / 2) {
        take_vectors<kRowsAtATime / 2, 2>(whole);
      } else {
        take_vectors<kRowsAtATime, 1>(whole);
      }
    } else {
      take_vectors<kRowsAtATime, 1>(whole);
    }
    take_rest(whole, columns);
  }
};

template <class In, class Out, class Sum>
__global__ void __launch_bounds__(kThreads, 2) combine_rows(const __grid_constant__ CombineArgs args) {
  __shared__ Operands<Sum> operands;
  bool finite = true;
  for (std::int64_t n = blockIdx.x; n < args.num_slices; n += gridDim.x) {
    const Slice slice = args.slices[args.first_slice + n];
    // The last tile of the slice, and from there backwards.
    std::int64_t number = slice.first_tile;
    if (number >= slice.end_tile) continue;
    number += (slice.end_tile - 1 - number) / slice.stride * slice.stride;
    int param = -1;
    std::uintptr_t out = 0;
    for (; number >= slice.first_tile; number -= slice.stride) {
      const Tile tile = args.tiles[number];
      if (tile.param != param) {
        param = tile.param;
        find_operands(args, slice.group, param, &operands);
        out = args.outputs[param];
      }
      Combination<In, Out, Sum>{operands, args.accumulate, args.found_inf != nullptr, tile.begin,
                                out,      &finite}
          .take(tile.columns);
    }
  }
  if (args.found_inf != nullptr && __syncthreads_or(!finite) != 0 && threadIdx.x == 0)
    atomicExch(args.found_inf, 1.0f);
}

template <class In, class Out, class Sum>
CombineKernel kernel() {
  return {combine_rows<In, Out, Sum>, kThreads, kThreads * Vector<In>::kElements, 8};
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
