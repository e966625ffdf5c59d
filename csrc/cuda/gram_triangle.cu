// Gram for up to eight rows: every thread holds the whole triangle for its own columns.
//
// A thread loads 16 bytes of every row, so a warp reads 512 bytes of each at once, and multiplies in
// registers. Products of float and double rows are taken in double: with K <= 8 that is at most 36 fused
// multiply-adds for 32 bytes, a third of what an A100 or H200 can do while it reads them. Products of 16-bit
// rows are exact in float and are added there over one tile, at most 32 of them, then in double. A thread
// whose sums in float cannot be trusted (a square under- or overflowed) takes its columns of the tile again,
// in double.
#include <cfloat>

#include "absent.h"
#include "elements.h"
#include "finish.h"
#include "gram_kernels.h"
#include "walk.h"

namespace mtl::cuda {
namespace {

constexpr int kThreads = 128;

template <int K>
constexpr int kPairs = K * (K + 1) / 2;

// Steps whose loads are issued together: enough bytes in flight for few rows too.
template <int K>
constexpr int kBatch = K <= 2   ? 4
                       : K <= 4 ? 2
                                : 1;

// Batches of a tile. For 16-bit rows a tile is also the run of sums in float, 32 products long.
template <class T, int K>
constexpr int kMaxBatches = (kIsHalf<T> ? 4 : 8) / kBatch<K>;

template <class T>
constexpr int kStep = kThreads * Vector<T>::kElements;

template <class X, int K>
__device__ __forceinline__ void add_products(const X (&x)[K], X (&sums)[kPairs<K>]) {
#pragma unroll
  for (int i = 0; i < K; ++i)
#pragma unroll
    for (int j = 0; j <= i; ++j) sums[i * (i + 1) / 2 + j] += x[i] * x[j];
}

template <class T, int K>
__device__ __forceinline__ void add_products(const Vector<T> (&rows)[K], double (&sums)[kPairs<K>]) {
#pragma unroll
  for (int c = 0; c < Vector<T>::kElements; ++c) {
    double x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = rows[k].exact(c);
    add_products<double, K>(x, sums);
  }
}

template <class T, int K>
__device__ __forceinline__ void add_products(const Vector<T> (&rows)[K], float (&sums)[kPairs<K>],
                                             unsigned (&bits)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    bits[k] |= rows[k].words[0] | rows[k].words[1] | rows[k].words[2] | rows[k].words[3];
#pragma unroll
  for (int c = 0; c < Vector<T>::kElements; ++c) {
    float x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = rows[k].number(c);
    add_products<float, K>(x, sums);
  }
}

// The columns of one tile, as one thread sees them: vectors from `first` to `whole`, kStep apart and a batch
// at a time, then single elements, kThreads apart, up to `end`.
template <class T, int K>
struct Columns {
  std::uintptr_t rows[K];
  std::int64_t first, whole, end;

  // Calls `use` with the vectors of every step.
  template <class Use>
  __device__ __forceinline__ void for_each_vector(Use use) const {
    for (std::int64_t column = first; column < whole; column += kBatch<K> * kStep<T>) {
      Vector<T> loaded[kBatch<K>][K];
#pragma unroll
      for (int b = 0; b < kBatch<K>; ++b)
#pragma unroll
        for (int k = 0; k < K; ++k) loaded[b][k] = load_vector<T>(rows[k], column + b * kStep<T>);
#pragma unroll
      for (int b = 0; b < kBatch<K>; ++b) use(loaded[b]);
    }
  }

  __device__ __forceinline__ void add_rest(double (&sums)[kPairs<K>]) const {
#pragma unroll 1
    for (std::int64_t column = whole + threadIdx.x; column < end; column += kThreads) {
      double x[K];
#pragma unroll
      for (int k = 0; k < K; ++k) x[k] = load_element<T>(rows[k], column);
      add_products<double, K>(x, sums);
    }
  }
};

template <class T, int K>
__device__ __forceinline__ void add_tile(const Columns<T, K>& columns, bool in_float,
                                         double (&sums)[kPairs<K>]) {
  columns.add_rest(sums);
  if (kIsHalf<T> && in_float) {
    float tile_sums[kPairs<K>] = {};
    unsigned bits[K] = {};
    if constexpr (kIsHalf<T>)
      columns.for_each_vector([&](const Vector<T>(&rows)[K]) { add_products<T, K>(rows, tile_sums, bits); });
    bool trusted = true;
#pragma unroll
    for (int k = 0; k < K; ++k)
      trusted = trusted && in_float_range<T>(bits[k]) && fabsf(tile_sums[k * (k + 3) / 2]) <= FLT_MAX;
    if (trusted) {
#pragma unroll
      for (int pair = 0; pair < kPairs<K>; ++pair) sums[pair] += static_cast<double>(tile_sums[pair]);
      return;
    }
  }
  columns.for_each_vector([&](const Vector<T>(&rows)[K]) { add_products<T, K>(rows, sums); });
}

// Adds up the sums of all threads, lanes then warps, and writes those of the first `num_tasks` rows.
template <int K>
__device__ __forceinline__ void write_block_sums(double (&sums)[kPairs<K>], int num_tasks, double* out) {
  __shared__ double warp_sums[kThreads / kWarp][kPairs<K>];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int pair = 0; pair < kPairs<K>; ++pair) {
    double total = sums[pair];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    if (lane == 0) warp_sums[warp][pair] = total;
  }
  __syncthreads();
  for (int pair = static_cast<int>(threadIdx.x); pair < num_pairs(num_tasks); pair += kThreads) {
    double total = 0.0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += warp_sums[w][pair];
    out[pair] = total;
  }
  __syncthreads();
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads, K <= 4       ? 4
                                            : kIsHalf<T> ? 2
                                                         : 3)
    gram_triangle(const __grid_constant__ GramArgs args) {
  for (std::int64_t n = blockIdx.x; n < args.num_slices; n += gridDim.x) {
    const std::int64_t slice_number = args.first_slice + n;
    const Slice slice = args.slices[slice_number];
    double sums[kPairs<K>] = {};
    Columns<T, K> columns{};
    bool aligned = false;
    Walk walk(args.spans + slice.first_span, static_cast<int>(slice.num_spans), -1);
    for (std::int64_t tile = slice.first_tile; tile < slice.num_tiles; tile += slice.stride) {
      if (walk.seek(tile)) {
        std::uintptr_t any = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          columns.rows[k] = row_pointer(args.pointers, args.num_params, args.num_tasks, k, walk.span().param);
          any |= columns.rows[k];
        }
        aligned = any % 16 == 0;
      }
      const std::int64_t begin = (tile - walk.span().first_tile) * args.tile_columns;
      const std::int64_t left = walk.span().columns - begin;
      const std::int64_t length = left < args.tile_columns ? left : args.tile_columns;
      columns.first = begin + static_cast<std::int64_t>(threadIdx.x) * Vector<T>::kElements;
      columns.whole = begin + (aligned ? length / (kBatch<K> * kStep<T>)*(kBatch<K> * kStep<T>) : 0);
      columns.end = begin + length;
      add_tile<T, K>(columns, slice.columns >= kFloatColumns, sums);
    }
    double* out = args.slice_sums + slice_number * num_pairs(args.num_tasks);
    write_block_sums<K>(sums, args.num_tasks, out);
    mend_absent_rows<T>(args, slice_number, out);
    finish(args, slice_number);
  }
}

template <class T, int K>
GramKernel kernel() {
  return {gram_triangle<T, K>, kThreads, 0, kBatch<K> * kStep<T>, kMaxBatches<T, K>};
}

template <class T>
GramKernel kernel_for(int num_tasks) {
  if (num_tasks <= 2) return kernel<T, 2>();
  if (num_tasks <= 4) return kernel<T, 4>();
  return kernel<T, 8>();
}

}  // namespace

GramKernel triangle_kernel(DType dtype, int num_tasks) {
  return with_element(dtype, [&](auto element) { return kernel_for<decltype(element)>(num_tasks); });
}

}  // namespace mtl::cuda
