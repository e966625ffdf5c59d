#pragma once

// What every kernel does that makes one value of the K values of a column: it walks its tiles, and reads the
// rows that reach a parameter.
//
// A thread loads 16 bytes of eight rows at a time, adds them to what it keeps of its columns, and writes
// these when it has seen all rows: so the output may be one of the rows. Tiles are taken in falling order,
// the reverse of gram's, because what gram read last is what the L2 cache still holds.
//
// An operation says what is kept of a column:
//   Number, Weight         the type of what is computed, and of what comes with a row
//   kRows                  how many rows are read at a time
//   kWeighted              whether rows have weights
//   kEpilogues             whether there may be something to add to, and to look for infinities in
//   Column                 what is kept of one, from {} on
//   add(&column, weight, value)
//   results<kCount>(columns, first, stride, &numbers)   of columns `stride` apart, from the parameter's
//   `first` on

#include "combine_args.h"
#include "elements.h"
#include "mtl_kernels/rows.h"

namespace mtl::cuda {

constexpr int kColumnThreads = 256;
constexpr int kRowsAtATime = 8;

// The rows that reach the parameter at hand, in the order of the tasks, for all threads of a block.
template <class Weight>
struct Operands {
  std::uintptr_t rows[kMaxTasks];
  Weight weights[kMaxTasks];
  int count;
  bool aligned;  // 16 bytes divide the addresses of rows and output
};

// All threads call it, and may read what it found when it returns.
template <bool kWeighted, class Weight>
__device__ __forceinline__ void find_operands(const CombineArgs& args, std::int64_t group, int param,
                                              Operands<Weight>* operands) {
  constexpr int kTurns = kMaxTasks / kWarp;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int lane = static_cast<int>(threadIdx.x);
    const double scale = !kWeighted || args.scale == nullptr ? 1.0 : *args.scale;
    bool aligned = args.outputs[param] % 16 == 0;
    std::uintptr_t rows[kTurns];
    double weights[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {  // none of the loads waits for another
      const int k = turn * kWarp + lane;
      rows[turn] = row_address(args.pointers, args.num_params, args.num_tasks, k, param);
      weights[turn] = kWeighted && k < args.num_tasks ? args.weights[group * args.num_tasks + k] : 0.0;
    }
    int count = 0;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const unsigned there = __ballot_sync(kAllLanes, rows[turn] != 0);
      if (rows[turn] != 0) {
        const int place = count + __popc(there & ((1u << lane) - 1));
        operands->rows[place] = rows[turn];
        if (kWeighted) operands->weights[place] = static_cast<Weight>(weights[turn] * scale);
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
template <class In, class Out, class Operation>
struct ColumnTile {
  using Number = typename Operation::Number;
  using Weight = typename Operation::Weight;
  using Column = typename Operation::Column;
  static constexpr int kElements = Vector<In>::kElements, kStep = kColumnThreads * kElements;

  const Operands<Weight>& operands;
  Operation operation;
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

  // Adds the rows to the columns, kRows of them at a time in each of kSteps steps. `load(row, step)` reads
  // what this thread takes of one.
  template <int kRows, int kSteps, class Load>
  __device__ __forceinline__ void add_rows(Load load, Column (&columns)[kSteps][kElements]) const {
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
        const Weight weight = Operation::kWeighted ? operands.weights[first + k] : Weight{};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int c = 0; c < kElements; ++c)
            Operation::add(columns[step][c], weight, loaded[step][k].template as<Number>(c));
      }
    }
  }

  __device__ __forceinline__ void write_vector(std::int64_t column,
                                               const Column (&columns)[kElements]) const {
    using Outs = Pack<Out, kElements>;
    auto* to = static_cast<Outs*>(output(column));
    Outs outs;
    Number numbers[kElements];
    operation.template results<kElements>(columns, column, 1, numbers);
    if (Operation::kEpilogues && accumulate) {
      outs = *to;
#pragma unroll
      for (int c = 0; c < kElements; ++c) numbers[c] += to_number<Number>(outs.at[c]);
    }
#pragma unroll
    for (int c = 0; c < kElements; ++c) outs.at[c] = rounded<Out>(numbers[c]);
    if (Operation::kEpilogues && looks_for_inf) *finite = all_finite(outs.at) && *finite;
    *to = outs;
  }

  // The columns before `whole`. Enough bytes in flight for few rows too.
  template <int kRows, int kSteps>
  __device__ __forceinline__ void take_vectors(int whole) const {
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x) * kElements; column < whole; column += kSteps * kStep) {
      Column columns[kSteps][kElements] = {};
      const std::int64_t at = begin + column;
      add_rows<kRows, kSteps>(
          [&](std::uintptr_t row, int step) {
            return column + step * kStep < whole
                       ? load_words<In>(global_memory(address<In>(row, at + step * kStep)))
                       : Vector<In>{};
          },
          columns);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        if (column + step * kStep < whole) write_vector(at + step * kStep, columns[step]);
    }
  }

  // The columns from `whole` to `end`, which no vector holds.
  __device__ __forceinline__ void take_rest(int whole, int end) const {
#pragma unroll 1
    for (int column = whole + static_cast<int>(threadIdx.x); column < end; column += kStep) {
      Column columns[1][kElements] = {};
      add_rows<Operation::kRows, 1>(
          [&](std::uintptr_t row, int) {
            return gather_elements<In>(address<In>(row, begin), column, kColumnThreads, end);
          },
          columns);
      Number numbers[kElements];
      operation.template results<kElements>(columns[0], begin + column, kColumnThreads, numbers);
#pragma unroll
      for (int c = 0; c < kElements; ++c) {
        if (column + c * kColumnThreads >= end) continue;
        auto* to = static_cast<Out*>(output(begin + column + c * kColumnThreads));
        if (Operation::kEpilogues && accumulate) numbers[c] += to_number<Number>(*to);
        const Out value[] = {rounded<Out>(numbers[c])};
        if (Operation::kEpilogues && looks_for_inf) *finite = all_finite(value) && *finite;
        *to = value[0];
      }
    }
  }

  __device__ __forceinline__ void take(int columns) const {
    const int whole = operands.aligned ? columns / kElements * kElements : 0;
    // What is nearly always the case, of columns of which little is kept.
    constexpr int kRows = Operation::kRows;
    if constexpr (std::is_same_v<In, Out> && sizeof(Column) <= 2 * sizeof(Number)) {
      if (operands.count <= kRows / 2) {
        take_vectors<kRows / 2, 2>(whole);
      } else {
        take_vectors<kRows, 1>(whole);
      }
    } else {
      take_vectors<kRows, 1>(whole);
    }
    take_rest(whole, columns);
  }
};

// Calls `use(tile, out)` for the tiles of this block, one after the other, with the rows that reach each.
template <bool kWeighted, class Weight, class Use>
__device__ __forceinline__ void for_each_tile(const CombineArgs& args, Operands<Weight>* operands, Use use) {
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
        find_operands<kWeighted>(args, slice.group, param, operands);
        out = args.outputs[param];
      }
      use(tile, out);
    }
  }
}

}  // namespace mtl::cuda
