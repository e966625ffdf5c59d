// The weighted sum of the rows over one segment of columns, on one thread.
//
// Up to eight rows are read side by side in one pass; more rows take several passes over a block of columns
// whose sums stay in the first-level cache. Sums are double and rounded once, when they are written.
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

template <class T>
void combine(const RowTable& table, const Segment& segment, const double* weights, void* out,
             bool past_cache) {
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
  T* to = static_cast<T*>(out) + segment.begin;
  std::int64_t n = segment.length;
  // Stores past the cache need whole aligned lines.
  const std::uintptr_t misaligned = reinterpret_cast<std::uintptr_t>(to) % kCacheLine;
  if (!past_cache || misaligned % sizeof(T) != 0) return combine<T, false>(num_rows, rows, w, n, to);
  std::int64_t head = misaligned == 0 ? 0 : static_cast<std::int64_t>((kCacheLine - misaligned) / sizeof(T));
  if (head > n) head = n;
  if (head > 0) {
    const T* start[kMaxTasks];
    for (int i = 0; i < num_rows; ++i) start[i] = rows[i];
    combine<T, false>(num_rows, start, w, head, to);
    for (int i = 0; i < num_rows; ++i) rows[i] += head;
  }
  combine<T, true>(num_rows, rows, w, n - head, to + head);
  stream_fence();
}

}  // namespace

void combine_segment(const RowTable& rows, const Segment& segment, const double* weights, void* out,
                     bool past_cache) {
  switch (rows.dtypes[segment.param]) {
    case DType::kFloat32:
      return combine<float>(rows, segment, weights, out, past_cache);
    case DType::kFloat64:
      return combine<double>(rows, segment, weights, out, past_cache);
    case DType::kBFloat16:
      return combine<BFloat16>(rows, segment, weights, out, past_cache);
    case DType::kFloat16:
      return combine<Float16>(rows, segment, weights, out, past_cache);
  }
}

}  // namespace mtl::cpu::MTL_ISA
