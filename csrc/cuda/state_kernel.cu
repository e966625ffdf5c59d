// A row updates its state in place, and leaves one sum: read both, write one, element by element in double. A
// slice belongs to one task of one group, so a block has one sum of its own.
#include "elements.h"
#include "pods.h"
#include "state_kernels.h"
#include "teams.h"

namespace mtl::cuda {
namespace {

constexpr int kThreads = 256;

template <class Operation>
__device__ __forceinline__ Operation operation_of(const StateCall& call, std::int64_t place) {
  if constexpr (std::is_same_v<Operation, Average>) {
    return {call.keep[place], call.gain[place]};
  } else {
    return {call.gain[place], call.epsilon};
  }
}

struct Root {
  __device__ double operator()(double x) const { return sqrt(x); }
};

// One element; what it adds to the sum.
template <class State, class Operation>
__device__ __forceinline__ double update(const Operation& operation, double g, State* state) {
  double s = operation.reads_state() ? to_double(*state) : 0.0;
  if (operation.writes()) {
    *state = rounded<State>(operation.next(s, g));
    s = to_double(*state);
  }
  return operation.term(s, g, Root{});
}

template <class In, class State, class Operation>
__device__ __forceinline__ double update_tile(const Operation& operation, std::uintptr_t row,
                                              std::uintptr_t state, const Tile& tile) {
  constexpr int kElements = Vector<In>::kElements;
  using States = Pack<State, kElements>;
  const bool aligned = (row | state) % 16 == 0;
  const int whole = aligned ? tile.columns / kElements * kElements : 0;
  if (!operation.reads_row()) row = 0;
  double sum = 0.0;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x) * kElements; c < whole; c += kThreads * kElements) {
    auto* place = reinterpret_cast<States*>(static_cast<State*>(global_memory(state)) + (tile.begin + c));
    const Vector<In> g = load_vector<In>(row, tile.begin + c);
    States states = *place;
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += update(operation, g.exact(i), &states.at[i]);
    if (operation.writes()) *place = states;
  }
#pragma unroll 1
  for (int c = whole + static_cast<int>(threadIdx.x); c < tile.columns; c += kThreads) {
    auto* place = static_cast<State*>(global_memory(state)) + (tile.begin + c);
    const double g = row == 0 ? 0.0 : to_double(*element_at<In>(row, tile.begin + c));
    State own = *place;
    sum += update(operation, g, &own);
    if (operation.writes()) *place = own;
  }
  return sum;
}

template <class In, class State, class Operation>
__global__ void __launch_bounds__(kThreads, 3) update_states(const __grid_constant__ StateArgs args) {
  for (std::int64_t n = blockIdx.x; n < args.num_slices; n += gridDim.x) {
    const std::int64_t slice_number = args.first_slice + n;
    const Slice& slice = args.slices[slice_number];
    const auto operation = operation_of<Operation>(args.call, slice.group);
    double sum = 0.0;
    for (std::int64_t number = slice.first_tile; number < slice.end_tile; number += slice.stride) {
      const Tile tile = args.tiles[number];
      const std::uintptr_t state = args.states[tile.param];
      if (state != 0) sum += update_tile<In, State>(operation, args.rows[tile.param], state, tile);
    }
    const double total = BlockTeam{}.sum(sum);
    if (threadIdx.x == 0) args.meeting.slice_sums[slice_number] = total;
    __syncthreads();
    completes_group<1>(args.meeting, slice, 1,
                       [&](int, double group_total) { args.sums[slice.group] = group_total; });
  }
}

}  // namespace

StateKernel state_kernel(DType rows, DType states, StateOperation operation) {
  return with_element(rows, [&](auto in) {
    return with_element(states, [&](auto state) -> StateKernel {
      using In = decltype(in);
      using State = decltype(state);
      return {operation == StateOperation::kAverage ? update_states<In, State, Average>
                                                    : update_states<In, State, SumOfSquares>,
              kThreads, kThreads * Vector<In>::kElements, 8};
    });
  });
}

}  // namespace mtl::cuda
