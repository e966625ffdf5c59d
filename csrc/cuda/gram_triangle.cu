// Gram for up to eight rows: every thread holds the whole triangle for its own columns.
//
// A thread loads 16 bytes of every row, so a warp reads 512 bytes of each at once, and multiplies in
// registers. Products of float and double rows are taken in double: with K <= 8 that is at most 36 fused
// multiply-adds for 32 bytes, a third of what an A100 or H200 can do while it reads them. Products of 16-bit
// rows are exact in float and are added there over a run of some 32 of them, then in double; so are those of
// float rows, which are not exact, on devices that would take longer in double than they take to read. A
// thread whose sums in float cannot be trusted (a square under- or overflowed) takes its columns of the run
// again, in double.
#include <cfloat>

#include "absent.h"
#include "elements.h"
#include "finish.h"
#include "gram_kernels.h"

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

// Batches of a run of sums in float: 32 products long, and one more where the columns end.
template <class T, int K>
constexpr int kRunBatches = (kIsHalf<T> ? 4 : 8) / kBatch<K>;

// Steps of a tile where every block has many.
constexpr int kLongTile = 32;

template <class T>
constexpr int kStep = kThreads * Vector<T>::kElements;

template <class T, int K>
constexpr int kRun = kRunBatches<T, K> * kBatch<K> * kStep<T>;  // columns

// Whether the loads of a batch are issued before the products of the one before: for so many sums that few
// threads run at a time, and what they read at once would not do.
template <int K, bool kFloatSums>
constexpr bool kReadsAhead = kFloatSums && K > 6;

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

// The columns of one tile as one thread sees them, from where the tile begins: vectors up to `whole`, kStep
// apart and a batch at a time, then up to `end` what no vector holds.
template <class T, int K>
struct Columns {
  std::uintptr_t rows[K];
  int whole, end;

  __device__ static int first_column() { return static_cast<int>(threadIdx.x) * Vector<T>::kElements; }

  __device__ __forceinline__ void load(int column, Vector<T> (&loaded)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) loaded[k] = load_vector<T>(column < whole ? rows[k] : 0, column);
  }

  // Calls `use` with the vectors of [first, last), a multiple of kRun.
  template <class Use>
  __device__ __forceinline__ void for_each_vector(int first, int last, Use use) const {
    const int end_vector = min(last, whole);
#pragma unroll 1
    for (int column = first + first_column(); column < end_vector; column += kBatch<K> * kStep<T>) {
      Vector<T> loaded[kBatch<K>][K];
#pragma unroll
      for (int b = 0; b < kBatch<K>; ++b) load(column + b * kStep<T>, loaded[b]);
#pragma unroll
      for (int b = 0; b < kBatch<K>; ++b) use(loaded[b]);
    }
    for_each_gathered(first, last, use);
  }

  // The same with the next vectors on their way. `ahead` holds the first ones, and then those at `last`.
  template <class Use>
  __device__ __forceinline__ void for_each_vector_ahead(int first, int last, Vector<T> (&ahead)[K],
                                                        Use use) const {
    const int end_vector = min(last, whole);
#pragma unroll 1
    for (int column = first + first_column(); column < end_vector; column += kStep<T>) {
      Vector<T> loaded[K];
#pragma unroll
      for (int k = 0; k < K; ++k) loaded[k] = ahead[k];
      load(column + kStep<T>, ahead);
      use(loaded);
    }
    for_each_gathered(first, last, use);
  }

 private:
  template <class Use>
  __device__ __forceinline__ void for_each_gathered(int first, int last, Use use) const {
    const int end_element = min(last, end);
#pragma unroll 1
    for (int column = max(first, whole) + static_cast<int>(threadIdx.x); column < end_element;
         column += kStep<T>) {
      Vector<T> loaded[K];
#pragma unroll
      for (int k = 0; k < K; ++k) loaded[k] = gather_elements<T>(rows[k], column, kThreads, end_element);
      use(loaded);
    }
  }
};

// The sums of a run in float, added to `sums` if they can be trusted.
template <class T, int K, class ForEach>
__device__ __forceinline__ bool add_run(ForEach for_each_vector, double (&sums)[kPairs<K>]) {
  float run_sums[kPairs<K>] = {};
  unsigned bits[K] = {};
  for_each_vector([&](const Vector<T>(&rows)[K]) { add_products<T, K>(rows, run_sums, bits); });
  bool trusted = true;
#pragma unroll
  for (int k = 0; k < K; ++k)
    trusted = trusted && in_float_range<T>(bits[k]) && fabsf(run_sums[k * (k + 3) / 2]) <= FLT_MAX;
  if (trusted) {
#pragma unroll
    for (int pair = 0; pair < kPairs<K>; ++pair) sums[pair] += static_cast<double>(run_sums[pair]);
  }
  return trusted;
}

template <class T, int K, bool kFloatSums>
__device__ __forceinline__ void add_tile(const Columns<T, K>& columns, bool in_float,
                                         double (&sums)[kPairs<K>]) {
  const auto in_double = [&](const Vector<T>(&rows)[K]) { add_products<T, K>(rows, sums); };
  if constexpr (!kFloatSums) {
    columns.for_each_vector(0, columns.end, in_double);
  } else {
    [[maybe_unused]] Vector<T> ahead[K];
    if constexpr (kReadsAhead<K, kFloatSums>) {
      if (in_float) columns.load(columns.first_column(), ahead);
    }
#pragma unroll 1
    for (int first = 0; first < columns.end; first += kRun<T, K>) {
      const int last = first + kRun<T, K>;
      const auto for_each_vector = [&](auto use) {
        if constexpr (kReadsAhead<K, kFloatSums>) {
          columns.for_each_vector_ahead(first, last, ahead, use);
        } else {
          columns.for_each_vector(first, last, use);
        }
      };
      if (in_float && add_run<T, K>(for_each_vector, sums)) continue;
      columns.for_each_vector(first, last, in_double);
    }
  }
}

// Adds up kCount sums over the lanes of a warp. At every step a lane hands half of them to its partner and
// takes over the other half, so that few are exchanged. Calls `store(number, sum)` in one lane for each.
template <int kCount, int kOffset, class Store>
__device__ __forceinline__ void add_lanes(const double (&sums)[kCount], int thread, int first, int count,
                                          Store store) {
  const bool upper = (thread & kOffset) != 0;
  if constexpr (kOffset == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < count) store(first + i, sums[i]);
  } else {
    constexpr int kHalf = (kCount + 1) / 2;
    double kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const double low = sums[i], high = kHalf + i < kCount ? sums[kHalf + i] : 0.0;
      kept[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kOffset);
    }
    const int low_count = count < kHalf ? count : kHalf;
    add_lanes<kHalf, kOffset / 2>(kept, thread, upper ? first + kHalf : first,
                                  upper ? count - low_count : low_count, store);
  }
}

// Adds up the sums of all threads, lanes then warps, and writes those of the first `num_tasks` rows. Whether
// what this thread writes is finite.
template <int K>
__device__ __forceinline__ bool write_block_sums(const double (&sums)[kPairs<K>], int num_tasks,
                                                 double* out) {
  __shared__ double warp_sums[kThreads / kWarp][kPairs<K>];
  const int thread = opaque(static_cast<int>(threadIdx.x));
  add_lanes<kPairs<K>, kWarp / 2>(sums, thread, 0, kPairs<K>,
                                  [&](int pair, double sum) { warp_sums[thread / kWarp][pair] = sum; });
  __syncthreads();
  static_assert(kPairs<K> <= kThreads, "a thread writes one sum at most");
  if (thread >= num_pairs(num_tasks)) return true;
  double total = 0.0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += warp_sums[w][thread];
  out[thread] = total;
  return fabs(total) <= DBL_MAX;
}

// At a time on a multiprocessor: what the registers allow.
template <int K, bool kFloatSums>
constexpr int kMinBlocks = (K <= 6 ? 4 : 3) - (kFloatSums && K > 4 ? 1 : 0);

template <class T, int K, bool kFloatSums>
__global__ void __launch_bounds__(kThreads, kMinBlocks<K, kFloatSums>)
    gram_triangle(const __grid_constant__ GramArgs args) {
  const int end_slice = static_cast<int>(args.first_slice + args.num_slices);
  for (int slice_number = static_cast<int>(args.first_slice + blockIdx.x); slice_number < end_slice;
       slice_number += static_cast<int>(gridDim.x)) {
    const Slice slice = args.slices[slice_number];
    double sums[kPairs<K>] = {};
    const int end_tile = static_cast<int>(slice.end_tile), stride = static_cast<int>(slice.stride);
    const bool in_float = slice.columns >= kFloatColumns;
    int number = static_cast<int>(slice.first_tile);
    Tile next = {};
    if (number < end_tile) next = args.tiles[number];
    for (; number < end_tile; number += stride) {
      const Tile tile = next;
      if (number + stride < end_tile) next = args.tiles[number + stride];  // ahead of the time
      Columns<T, K> columns;
      std::uintptr_t any = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const std::uintptr_t row = row_address(args.pointers, args.num_params, args.num_tasks, k, tile.param);
        any |= row;
        columns.rows[k] = row == 0 ? 0 : row + tile.begin * static_cast<int>(sizeof(T));
      }
      columns.whole = any % 16 == 0 ? tile.columns / Vector<T>::kElements * Vector<T>::kElements : 0;
      columns.end = tile.columns;
      add_tile<T, K, kFloatSums>(columns, in_float, sums);
    }
    double* out =
        args.meeting.slice_sums + static_cast<std::int64_t>(slice_number) * num_pairs(args.num_tasks);
    const bool finite = write_block_sums<K>(sums, args.num_tasks, out);
    mend_absent_rows<T>(args, slice_number, finite, out);
    finish<kTriangleTasks>(args, slice_number);
  }
}

template <class T, int K, bool kFloatSums>
GramKernel kernel() {
  return {gram_triangle<T, K, kFloatSums>,
          kThreads,
          0,
          kBatch<K> * kStep<T>,
          kRunBatches<T, K>,
          kLongTile / kBatch<K>};
}

template <class T, bool kFloatSums>
GramKernel kernel_for(int num_tasks) {
  if (num_tasks <= 2) return kernel<T, 2, kFloatSums>();
  if (num_tasks <= 4) return kernel<T, 4, kFloatSums>();
  if (num_tasks <= 6) return kernel<T, 6, kFloatSums>();
  return kernel<T, 8, kFloatSums>();
}

}  // namespace

GramKernel triangle_kernel(DType dtype, int num_tasks, bool slow_double) {
  if (dtype == DType::kFloat32 && slow_double) return kernel_for<float, true>(num_tasks);
  return with_element(dtype, [&](auto element) {
    return kernel_for<decltype(element), kIsHalf<decltype(element)>>(num_tasks);
  });
}

}  // namespace mtl::cuda
