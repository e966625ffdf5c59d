// The mean of each column without its extreme values. A thread has a column in shared memory, where it moves
// the extremes to the ends by the same exchanges as all others; a column of shared memory is a bank, or two
// of them for double.
#include "columns.h"
#include "combine_kernels.h"
#include "mtl_kernels/elementwise.h"

namespace mtl::cuda {
namespace {

// Of a block: K columns of numbers are to fit what shared memory it can have anywhere.
template <class Number>
constexpr int kTrimThreads = sizeof(Number) == 8 ? 64 : 128;

// What elements are compared as: every one shorter than double is a float.
template <class T>
using NumberOf = std::conditional_t<sizeof(T) == 8, double, float>;

template <class Number>
struct Exchange {
  Number* column;

  MTL_HD void operator()(int i, int j) const {
    constexpr int kStride = kTrimThreads<Number>;
    const Number a = column[i * kStride], b = column[j * kStride];
    column[i * kStride] = a < b ? a : b;
    column[j * kStride] = a < b ? b : a;
  }
};

template <class T>
__device__ __forceinline__ T trimmed_mean(const Operands<float>& operands, int num_tasks, int trim,
                                          std::int64_t at, NumberOf<T>* column) {
  using Number = NumberOf<T>;
  constexpr int kStride = kTrimThreads<Number>;
  bool ordered = true;
  for (int first = 0; first < operands.count; first += kRowsAtATime) {
    Number values[kRowsAtATime];
#pragma unroll
    for (int k = 0; k < kRowsAtATime; ++k)
      values[k] = first + k < operands.count ? to_number<Number>(*element_at<T>(operands.rows[first + k], at))
                                             : Number{};
#pragma unroll
    for (int k = 0; k < kRowsAtATime; ++k) {
      if (first + k < operands.count) column[(first + k) * kStride] = values[k];
      ordered = ordered && values[k] == values[k];
    }
  }
  for (int k = operands.count; k < num_tasks; ++k)
    column[k * kStride] = 0;  // who does not reach the parameter
  move_extremes(num_tasks, trim, Exchange<Number>{column});
  double sum = 0.0;
  for (int k = trim; k < num_tasks - trim; ++k) sum += column[k * kStride];
  const double mean = sum / (num_tasks - 2 * trim);
  return rounded<T>(ordered ? mean : __longlong_as_double(0x7ff8000000000000ll));
}

template <class T>
__global__ void __launch_bounds__(kTrimThreads<NumberOf<T>>)
    trim_rows(const __grid_constant__ CombineArgs args) {
  using Number = NumberOf<T>;
  __shared__ Operands<float> operands;
  auto* column = reinterpret_cast<Number*>(dynamic_shared()) + threadIdx.x;
  for_each_tile<false>(args, &operands, [&](const Tile& tile, std::uintptr_t out) {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < tile.columns; c += kTrimThreads<Number>) {
      auto* to = static_cast<T*>(global_memory(out)) + (tile.begin + c);
      *to = trimmed_mean<T>(operands, args.num_tasks, args.trim, tile.begin + c, column);
    }
  });
}

}  // namespace

CombineKernel trimmed_mean_kernel(DType dtype, int num_tasks) {
  return with_element(dtype, [&](auto element) -> CombineKernel {
    using T = decltype(element);
    constexpr int kThreads = kTrimThreads<NumberOf<T>>;
    return {trim_rows<T>, kThreads, kThreads, 8, num_tasks * kThreads * sizeof(NumberOf<T>)};
  });
}

}  // namespace mtl::cuda
