// The weighted sum of the rows over one segment of columns, on one thread.
//
// Up to eight rows are read side by side in one pass; more rows take several passes over a block of columns
// whose sums stay in the first-level cache, and so does any number of them into another dtype or on top of
// what is there. Sums are double and rounded once, when they are written.
#include "kernels.h"
#include "simd.h"

namespace mtl::cpu::MTL_ISA {
namespace {

constexpr int kPassRows = 8;          // row streams that the hardware prefetchers follow at once
constexpr std::int64_t kBlock = 512;  // columns whose sums stay in the first-level cache

template <class T, int R>
inline Vec weighted(const T* const* rows, const Vec* w, std::int64_t c, Vec acc) {
  for (int r = 0; r < R; ++r) acc = fma(w[r], load(rows[r] + c), acc);
  return acc;
}

// sums[c] (+)= sum_r w[r] rows[r][c]; with kLast the sums are rounded and written to out instead.
template <class T, int R, bool kFirst, bool kLast, bool kPastCache>
void pass(const T* const* rows, const double* weights, std::int64_t n, double* sums, T* out) {
  Vec w[R];
  for (int r = 0; r < R; ++r) w[r] = broadcast(weights[r]);
  std::int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const Vec acc = weighted<T, R>(rows, w, c, kFirst ? Vec{} : load(sums + c));
    if (!kLast)
      store(sums + c, acc);
    else if (kPastCache)
      stream(out + c, acc);
    else
      store(out + c, acc);
  }
  if (c < n) {
    Vec acc = kFirst ? Vec{} : load_part(sums + c, n - c);
    for (int r = 0; r < R; ++r) acc = fma(w[r], load_part(rows[r] + c, n - c), acc);
    if (kLast)
      store_part(out + c, acc, n - c);
    else
      store_part(sums + c, acc, n - c);
  }
}

template <class T, bool kFirst, bool kLast, bool kPastCache>
void pass(int R, const T* const* rows, const double* w, std::int64_t n, double* sums, T* out) {
  switch (R) {
    case 1:
      return pass<T, 1, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    case 2:
      return pass<T, 2, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    case 3:
      return pass<T, 3, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    case 4:
      return pass<T, 4, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    case 5:
      return pass<T, 5, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    case 6:
      return pass<T, 6, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    case 7:
      return pass<T, 7, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
    default:
      return pass<T, 8, kFirst, kLast, kPastCache>(rows, w, n, sums, out);
  }
}

template <class T, bool kPastCache>
void combine(int num_rows, const T** rows, const double* weights, std::int64_t n, T* out) {
  if (num_rows <= kPassRows) {
    pass<T, true, true, kPastCache>(num_rows, rows, weights, n, nullptr, out);
    return;
  }
  alignas(kCacheLine) double sums[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t columns = n - begin < kBlock ? n - begin : kBlock;
    pass<T, true, false, false>(kPassRows, rows, weights, columns, sums, out);
    int r = kPassRows;
    for (; num_rows - r > kPassRows; r += kPassRows)
      pass<T, false, false, false>(kPassRows, rows + r, weights + r, columns, sums, out);
    pass<T, false, true, kPastCache>(num_rows - r, rows + r, weights + r, columns, sums, out + begin);
    for (int i = 0; i < num_rows; ++i) rows[i] += columns;
  }
}

template <class Out, bool kAccumulate, bool kPastCache>
void write(const double* sums, std::int64_t n, Out* out) {
  std::int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const Vec sum = load(sums + c);
    if (kPastCache)
      stream(out + c, sum);
    else
      store(out + c, kAccumulate ? sum + load(out + c) : sum);
  }
  if (c < n) {
    const Vec sum = load_part(sums + c, n - c);
    store_part(out + c, kAccumulate ? sum + load_part(out + c, n - c) : sum, n - c);
  }
}

// The same by way of sums in the first-level cache, whatever the dtype of the output.
template <class T, class Out, bool kAccumulate, bool kPastCache>
void combine_by_sums(int num_rows, const T** rows, const double* weights, std::int64_t n, Out* out) {
  alignas(kCacheLine) double sums[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t columns = n - begin < kBlock ? n - begin : kBlock;
    pass<T, true, false, false>(num_rows < kPassRows ? num_rows : kPassRows, rows, weights, columns, sums,
                                static_cast<T*>(nullptr));
    for (int r = kPassRows; r < num_rows; r += kPassRows)
      pass<T, false, false, false>(num_rows - r < kPassRows ? num_rows - r : kPassRows, rows + r, weights + r,
                                   columns, sums, static_cast<T*>(nullptr));
    write<Out, kAccumulate, kPastCache>(sums, columns, out + begin);
    for (int i = 0; i < num_rows; ++i) rows[i] += columns;
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <bool kPastCache, class T, class Out>
void write_combination(int num_rows, const T** rows, const double* weights, std::int64_t n, Out* out) {
  if constexpr (kSame<T, Out>)
    combine<T, kPastCache>(num_rows, rows, weights, n, out);
  else
    combine_by_sums<T, Out, false, kPastCache>(num_rows, rows, weights, n, out);
}

template <class T, class Out>
void combine(int num_rows, const T** rows, const double* w, std::int64_t n, Out* to, const Target& target) {
  if (target.accumulate) return combine_by_sums<T, Out, true, false>(num_rows, rows, w, n, to);
  // Stores past the cache need whole aligned lines.
  const std::uintptr_t misaligned = reinterpret_cast<std::uintptr_t>(to) % kCacheLine;
  if (!target.past_cache || misaligned % sizeof(Out) != 0)
    return write_combination<false>(num_rows, rows, w, n, to);
  std::int64_t head =
      misaligned == 0 ? 0 : static_cast<std::int64_t>((kCacheLine - misaligned) / sizeof(Out));
  if (head > n) head = n;
  if (head > 0) {
    const T* start[kMaxTasks];
    for (int i = 0; i < num_rows; ++i) start[i] = rows[i];
    write_combination<false>(num_rows, start, w, head, to);
    for (int i = 0; i < num_rows; ++i) rows[i] += head;
  }
  write_combination<true>(num_rows, rows, w, n - head, to + head);
  stream_fence();
}

template <class T>
void combine(const RowTable& table, const Segment& segment, const double* weights, const Target& target) {
  const T* rows[kMaxTasks];
  double w[kMaxTasks];
  int num_rows = 0;
  for (int k = 0; k < table.num_tasks; ++k) {
    const std::uintptr_t base = table.pointers[k * table.num_params + segment.param];
    if (base == 0) continue;
    rows[num_rows] = reinterpret_cast<const T*>(base) + segment.begin;
    w[num_rows++] = weights[k];
  }
  if (num_rows == 0) return;
  const auto into = [&](auto* out) {
    combine(num_rows, rows, w, segment.length, out + segment.begin, target);
  };
  switch (target.dtype) {
    case DType::kFloat32:
      return into(static_cast<float*>(target.out));
    case DType::kFloat64:
      return into(static_cast<double*>(target.out));
    case DType::kBFloat16:
      return into(static_cast<BFloat16*>(target.out));
    case DType::kFloat16:
      return into(static_cast<Float16*>(target.out));
  }
}

}  // namespace

void combine_segment(const RowTable& rows, const Segment& segment, const double* weights,
                     const Target& target) {
  switch (rows.dtypes[segment.param]) {
    case DType::kFloat32:
      return combine<float>(rows, segment, weights, target);
    case DType::kFloat64:
      return combine<double>(rows, segment, weights, target);
    case DType::kBFloat16:
      return combine<BFloat16>(rows, segment, weights, target);
    case DType::kFloat16:
      return combine<Float16>(rows, segment, weights, target);
  }
}

}  // namespace mtl::cpu::MTL_ISA
