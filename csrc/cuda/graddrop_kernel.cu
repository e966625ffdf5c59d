// GradDrop: what combine does, but of four sums a column one is written, by the sign that was drawn.
#include "columns.h"
#include "combine_kernels.h"
#include "mtl_kernels/elementwise.h"

namespace mtl::cuda {
namespace {

// The numbers of kCount elements side by side, from number `first` on: from as many Philox blocks as they lie
// in, of which the first may begin with up to three others.
template <int kCount>
__device__ __forceinline__ void draw_side_by_side(const std::int64_t* rng, std::uint64_t first,
                                                  double (&thresholds)[kCount]) {
  constexpr int kBlocks = (kCount + 3 + 3) / 4;
  std::uint32_t words[4 * kBlocks];
  const unsigned before = static_cast<unsigned>(first) % 4;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    Philox4 found = {};
    if (4 * b < static_cast<int>(before) + kCount) found = threshold_words(rng, first / 4 + b);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * b + i] = found.word[i];
  }
#pragma unroll
  for (int shift = 1; shift <= 2; ++shift)
#pragma unroll
    for (int i = 0; i + shift < 4 * kBlocks; ++i)
      words[i] = (before & static_cast<unsigned>(shift)) != 0 ? words[i + shift] : words[i];
#pragma unroll
  for (int c = 0; c < kCount; ++c) thresholds[c] = threshold_of(words[c]);
}

__device__ __forceinline__ double draw_one(const std::int64_t* rng, std::uint64_t number) {
  const Philox4 words = threshold_words(rng, number / 4);
  const unsigned low = number % 2 == 0 ? words.word[0] : words.word[1];
  const unsigned high = number % 2 == 0 ? words.word[2] : words.word[3];
  return threshold_of(number % 4 < 2 ? low : high);
}

template <class T, bool kLeaks>
struct SignDrop {
  using Number = double;
  using Weight = double;
  using Column = GradDrop<double, kLeaks>;
  // Of eight columns with four sums each, registers hold four rows beside them.
  static constexpr int kRows = kLeaks && kIsHalf<T> ? 4 : kRowsAtATime;
  static constexpr bool kWeighted = kLeaks, kEpilogues = false;

  const std::int64_t* rng;
  std::int64_t first_element;  // of the parameter

  static __device__ __forceinline__ void add(Column& column, double leak, double value) {
    column.add(value, leak);
  }
  template <int kCount>
  __device__ __forceinline__ void results(const Column (&columns)[kCount], std::int64_t first, int stride,
                                          double (&numbers)[kCount]) const {
    const auto number = static_cast<std::uint64_t>(first_element + first);
    if (stride == 1) {
      draw_side_by_side<kCount>(rng, number, numbers);
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) numbers[c] = draw_one(rng, number + c * stride);
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) numbers[c] = columns[c].value(numbers[c]);
  }
};

template <class T, bool kLeaks>
__global__ void __launch_bounds__(kColumnThreads, 2) drop_rows(const __grid_constant__ CombineArgs args) {
  __shared__ Operands<double> operands;
  for_each_tile<kLeaks>(args, &operands, [&](const Tile& tile, std::uintptr_t out) {
    ColumnTile<T, T, SignDrop<T, kLeaks>>{
        operands, {args.rng, args.first_elements[tile.param]}, false, false, tile.begin, out, nullptr}
        .take(tile.columns);
  });
}

}  // namespace

CombineKernel graddrop_kernel(DType dtype, bool leaks) {
  return with_element(dtype, [&](auto element) -> CombineKernel {
    using T = decltype(element);
    return {leaks ? drop_rows<T, true> : drop_rows<T, false>, kColumnThreads,
            kColumnThreads * Vector<T>::kElements, 8};
  });
}

}  // namespace mtl::cuda
