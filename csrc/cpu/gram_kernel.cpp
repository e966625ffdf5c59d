// The Gram products of one chunk of columns, on one thread.
//
// Few rows: all products of a vector of columns are taken in one pass over the rows, in registers.
// More rows: columns are taken in blocks short enough to stay in the first-level cache; register tiles of
// rows x rows run over a block and meanwhile ask for memory a little further on, so that memory and
// arithmetic work at the same time. Many rows would lie in the same cache sets (large tensors begin at equal
// offsets in their pages), so their block is copied into a buffer first.
//
// Products are summed in double, where those of float32 and narrower elements are exact; or, when the caller
// finds that this is accurate enough, in float over a bounded number of columns and in double from there on,
// at half the arithmetic. Each pair of rows has one vector of sums, added up over its lanes at the end of the
// chunk.
#include "kernels.h"
#include "simd.h"

namespace mtl::cpu::MTL_ISA {
namespace {

constexpr int kTile = kLanes == 8 ? 5 : 3;  // rows of a tile: the sums and operands of 5 x 5 fit 32 registers
constexpr int kDirect = kLanes == 8 ? 6 : 4;     // rows whose whole triangle fits the registers
constexpr int kInPlace = 12;                     // rows that are read where they are
constexpr int kStep = 16;                        // columns taken at a time
constexpr std::int64_t kFloatRun = 64 * kLanes;  // columns summed in float: at most 32 products a lane
constexpr std::int64_t kMaxBlock = kFloatRun / 2;
constexpr std::int64_t kPad = 16;          // keeps equal columns of different rows out of one cache set
constexpr std::int64_t kLookAhead = 2048;  // bytes by which prefetching runs ahead

std::size_t num_pairs(int num_tasks) { return static_cast<std::size_t>(num_tasks) * (num_tasks + 1) / 2; }

// Columns of a block; longer ones where the sums that a block reads and writes outgrow the first-level cache.
std::int64_t block_columns(int num_rows) { return num_rows > 24 ? kMaxBlock : kMaxBlock / 2; }

// Vectors of the buffer's element type E.
inline Vec load_as(const double*, const double* p) { return load(p); }
template <class T>
inline Vec load_as(const double*, const T* p) {
  return load(p);
}
template <class T>
inline VecF load_as(const float*, const T* p) {
  return load_floats(p);
}
template <class E>
using VecOf = decltype(load_as(static_cast<const E*>(nullptr), static_cast<const E*>(nullptr)));

template <class E, class T>
void copy(const T* from, std::int64_t n, E* to) {
  constexpr int kWidth = sizeof(VecOf<E>) / sizeof(E);
  std::int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) store(to + c, load_as(to, from + c));
  for (; c < n; ++c) to[c] = static_cast<E>(load_part(from + c, 1)[0]);
}

// The memory a tile asks for while it computes: `count` streams that move on `stride` bytes a column.
struct Prefetch {
  const char* stream[2 * kMaxTasks];
  int count;
  std::int64_t stride;
};

// Where a block stands in its run of blocks that are summed in float.
struct Run {
  bool first, last;
};

// *total += the sum of both halves of a vector of floats, in double.
inline void add_widened(const float* sums, double* total) {
  store(total, load(total) + (load(sums) + load(sums + kLanes)));
}

// sums[i][j] += <a_i, b_j> over the columns [begin, begin + n) of a tile of A x B rows; for a triangle (a ==
// b) only j <= i. Rows of element type T, one vector of E a sum.
//
// Sums in float go on from block to block of a run: the first block of a run starts from zero, and the last
// one adds what it has to the totals in double.
template <class E, class T, int A, int B, bool kTriangle>
void tile(const T* const* a, const T* const* b, std::int64_t begin, std::int64_t n, E* const* sums,
          double* const* totals, Run run, const Prefetch& next) {
  constexpr int kWidth = sizeof(VecOf<E>) / sizeof(E);
  const E* const as_sum = nullptr;
  VecOf<E> acc[A][B];
  MTL_UNROLL
  for (int i = 0; i < A; ++i) {
    MTL_UNROLL
    for (int j = 0; j < (kTriangle ? i + 1 : B); ++j)
      acc[i][j] = run.first ? VecOf<E>{} : load_as(as_sum, sums[i] + j * kWidth);
  }
  for (std::int64_t c = begin; c < begin + n; c += kStep) {
    for (int s = 0; s < next.count; ++s) __builtin_prefetch(next.stream[s] + (c - begin) * next.stride);
    MTL_UNROLL
    for (int l = 0; l < kStep; l += kWidth) {
      VecOf<E> x[A];
      MTL_UNROLL
      for (int i = 0; i < A; ++i) x[i] = load_as(as_sum, a[i] + c + l);
      MTL_UNROLL
      for (int j = 0; j < B; ++j) {
        const VecOf<E> y = kTriangle ? x[j] : load_as(as_sum, b[j] + c + l);
        MTL_UNROLL
        for (int i = kTriangle ? j : 0; i < A; ++i) acc[i][j] = fma(x[i], y, acc[i][j]);
      }
    }
  }
  if constexpr (sizeof(E) == sizeof(float)) {
    if (run.last) {
      // Through memory, where a vector of floats is two of doubles; widened in registers, the compiler spills
      // more.
      alignas(kCacheLine) E written[A][B][kWidth];
      MTL_UNROLL
      for (int i = 0; i < A; ++i) {
        MTL_UNROLL
        for (int j = 0; j < (kTriangle ? i + 1 : B); ++j) store(written[i][j], acc[i][j]);
      }
      for (int i = 0; i < A; ++i)
        for (int j = 0; j < (kTriangle ? i + 1 : B); ++j) add_widened(written[i][j], totals[i] + j * kLanes);
      return;
    }
  }
  MTL_UNROLL
  for (int i = 0; i < A; ++i) {
    MTL_UNROLL
    for (int j = 0; j < (kTriangle ? i + 1 : B); ++j) store(sums[i] + j * kWidth, acc[i][j]);
  }
}

template <class E, class T>
using TileFunction = void (*)(const T* const*, const T* const*, std::int64_t, std::int64_t, E* const*,
                              double* const*, Run, const Prefetch&);

// By the height of the tile; a tile below the diagonal is always kTile wide, because only the last one is
// short.
template <class E, class T>
constexpr TileFunction<E, T> kBelow[] = {nullptr,
                                         tile<E, T, 1, kTile, false>,
                                         tile<E, T, 2, kTile, false>,
                                         tile<E, T, 3, kTile, false>,
                                         tile<E, T, 4, kTile, false>,
                                         tile<E, T, 5, kTile, false>};
template <class E, class T>
constexpr TileFunction<E, T> kDiagonal[] = {nullptr,
                                            tile<E, T, 1, 1, true>,
                                            tile<E, T, 2, 2, true>,
                                            tile<E, T, 3, 3, true>,
                                            tile<E, T, 4, 4, true>,
                                            tile<E, T, 5, 5, true>};

// Adds the products of all pairs of rows over the columns [begin, begin + n), n a multiple of kStep, to
// `sums`, one vector of E per pair of the lower triangle. Prefetches the row that begins at ahead[k] for row
// k; T is what lies there.
template <class E, class S, class T>
void multiply(int num_rows, const S* const* rows, std::int64_t begin, std::int64_t n, E* sums, double* totals,
              Run run, const T* const* ahead) {
  constexpr int kWidth = sizeof(VecOf<E>) / sizeof(E);
  constexpr int kLines = kStep * sizeof(T) > kCacheLine ? kStep * sizeof(T) / kCacheLine : 1;
  const int tile_rows = (num_rows + kTile - 1) / kTile;
  const int num_tiles = tile_rows * (tile_rows + 1) / 2;
  E* row_sums[kTile];
  double* row_totals[kTile];
  Prefetch next;
  next.stride = sizeof(T);
  int t = 0;
  for (int i0 = 0; i0 < num_rows; i0 += kTile) {
    const int height = num_rows - i0 < kTile ? num_rows - i0 : kTile;
    for (int j0 = 0; j0 <= i0; j0 += kTile, ++t) {
      for (int i = 0; i < height; ++i) {
        row_sums[i] = sums + (num_pairs(i0 + i) + j0) * kWidth;
        row_totals[i] = totals + (num_pairs(i0 + i) + j0) * kLanes;
      }
      // The tiles share the rows among them: tile t prefetches rows t, t + num_tiles, ...
      next.count = 0;
      for (int k = t; k < num_rows; k += num_tiles)
        for (int line = 0; line < kLines; ++line)
          next.stream[next.count++] = reinterpret_cast<const char*>(ahead[k]) + line * kCacheLine;
      (j0 < i0 ? kBelow<E, S> : kDiagonal<E, S>)[height](rows + i0, rows + j0, begin, n, row_sums, row_totals,
                                                         run, next);
    }
  }
}

// All pairs of K rows over n columns in one pass.
template <class T, int K>
void direct(const T* const* rows, std::int64_t n, double* sums) {
  Vec acc[K * (K + 1) / 2];
  MTL_UNROLL
  for (int i = 0; i < K * (K + 1) / 2; ++i) acc[i] = Vec{};
  const auto add = [&acc](auto load_row) {
    Vec x[K];
    MTL_UNROLL
    for (int i = 0; i < K; ++i) {
      x[i] = load_row(i);
      MTL_UNROLL
      for (int j = 0; j <= i; ++j) acc[i * (i + 1) / 2 + j] = fma(x[i], x[j], acc[i * (i + 1) / 2 + j]);
    }
  };
  constexpr int kPerLine = static_cast<int>(kCacheLine / sizeof(T));
  std::int64_t c = 0;
  for (; c + kPerLine <= n; c += kPerLine) {
    MTL_UNROLL
    for (int i = 0; i < K; ++i) __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + c) + kLookAhead);
    MTL_UNROLL
    for (int l = 0; l < kPerLine; l += kLanes) add([&](int i) { return load(rows[i] + c + l); });
  }
  for (; c < n; c += kLanes)
    add([&](int i) { return n - c < kLanes ? load_part(rows[i] + c, n - c) : load(rows[i] + c); });
  MTL_UNROLL
  for (int i = 0; i < K * (K + 1) / 2; ++i) store(sums + i * kLanes, load(sums + i * kLanes) + acc[i]);
}

template <class T>
void direct(int num_tasks, const T* const* rows, std::int64_t n, double* sums) {
  switch (num_tasks) {
    case 1:
      return direct<T, 1>(rows, n, sums);
    case 2:
      return direct<T, 2>(rows, n, sums);
    case 3:
      return direct<T, 3>(rows, n, sums);
    case 4:
      return direct<T, 4>(rows, n, sums);
    case 5:
      return direct<T, 5>(rows, n, sums);
    default:
      return direct<T, 6>(rows, n, sums);
  }
}

// The state of one chunk. Work goes on over the rows that are present in the current parameter: an absent row
// takes no part, so that it stays a row of zeros whatever the others hold. Their sums are added to the
// chunk's when another set of rows becomes present.
class ChunkGram {
 public:
  ChunkGram(const RowTable& table, bool in_float, double* scratch)
      : table_(table), in_float_(in_float), total_(scratch) {
    const std::size_t vectors = num_pairs(table.num_tasks) * kLanes;
    sums_ = total_ + vectors;
    float_sums_ = reinterpret_cast<float*>(sums_ + vectors);
    buffer_ = sums_ + 2 * vectors;
    for (std::size_t i = 0; i < vectors; ++i) total_[i] = 0;
  }

  void add(const Segment& segment) {
    if (!same_rows(segment.param)) {
      leave_rows();
      enter_rows(segment.param);
    }
    switch (table_.dtypes[segment.param]) {
      case DType::kFloat32:
        return add<float>(segment);
      case DType::kFloat64:
        return add<double>(segment);
      case DType::kBFloat16:
        return add<BFloat16>(segment);
      case DType::kFloat16:
        return add<Float16>(segment);
    }
  }

  void finish(double* partial) {
    leave_rows();
    for (std::size_t pair = 0; pair < num_pairs(table_.num_tasks); ++pair)
      partial[pair] = sum(load(total_ + pair * kLanes));
  }

 private:
  std::uintptr_t address(int task, std::int64_t param) const {
    return table_.pointers[task * table_.num_params + param];
  }

  bool same_rows(std::int64_t param) const {
    int next = 0;
    for (int k = 0; k < table_.num_tasks; ++k) {
      const bool is_present = next < K_ && task_[next] == k;
      if (is_present != (address(k, param) != 0)) return false;
      next += is_present;
    }
    return true;
  }

  void enter_rows(std::int64_t param) {
    K_ = 0;
    for (int k = 0; k < table_.num_tasks; ++k)
      if (address(k, param) != 0) task_[K_++] = k;
    for (std::size_t i = 0; i < num_pairs(K_) * kLanes; ++i) sums_[i] = 0;
    block_ = block_columns(K_);
  }

  void leave_rows() {
    flush();
    drain();
    for (int i = 0; i < K_; ++i) {
      for (int j = 0; j <= i; ++j) {
        double* total = total_ + (num_pairs(task_[i]) + task_[j]) * kLanes;
        store(total, load(total) + load(sums_ + (num_pairs(i) + j) * kLanes));
      }
    }
    K_ = 0;
  }

  template <class T>
  void add(const Segment& segment) {
    if (K_ == 0) return;
    const T* row[kMaxTasks];
    for (int i = 0; i < K_; ++i)
      row[i] = reinterpret_cast<const T*>(address(task_[i], segment.param)) + segment.begin;
    if (K_ <= kDirect) {
      if (segment.length >= kMaxBlock) return direct(K_, row, segment.length, sums_);
      return append<double>(row, segment.length);
    }
    if constexpr (sizeof(T) < sizeof(double)) {
      if (in_float_ && K_ <= kInPlace) return in_place<float>(row, segment.length);
      if (in_float_) return append<float>(row, segment.length);
    }
    append<double>(row, segment.length);
  }

  template <class E, class T>
  void in_place(const T* const* row, std::int64_t length) {
    const T* ahead[kMaxTasks];
    std::int64_t c = 0;
    while (c + kStep <= length) {
      const std::int64_t left = (length - c) / kStep * kStep;
      const std::int64_t n = left < block_ ? left : block_;
      for (int i = 0; i < K_; ++i) ahead[i] = row[i] + c + kLookAhead / sizeof(T);
      multiply_block<E>(row, c, n, ahead);
      c += n;
    }
    if (c < length) {
      const T* rest[kMaxTasks];
      for (int i = 0; i < K_; ++i) rest[i] = row[i] + c;
      append<E>(rest, length - c);
    }
  }

  // Short parameters share a block; a block holds one element type.
  template <class E, class T>
  void append(const T* const* row, std::int64_t length) {
    if (block_in_float_ != (sizeof(E) == sizeof(float))) flush();
    block_in_float_ = sizeof(E) == sizeof(float);
    E* buffer = reinterpret_cast<E*>(buffer_);
    for (std::int64_t done = 0; done < length;) {
      const std::int64_t n = length - done < block_ - filled_ ? length - done : block_ - filled_;
      for (int i = 0; i < K_; ++i) copy(row[i] + done, n, buffer + i * stride() + filled_);
      done += n;
      filled_ += n;
      if (filled_ == block_) {
        const T* ahead[kMaxTasks];
        for (int i = 0; i < K_; ++i) ahead[i] = row[i] + done - n + kLookAhead / sizeof(T);
        multiply_block<E>(rows_of(buffer), 0, block_, ahead);
        filled_ = 0;
      }
    }
  }

  template <class E, class S, class T>
  void multiply_block(const S* const* rows, std::int64_t begin, std::int64_t n, const T* const* ahead) {
    if constexpr (sizeof(E) == sizeof(double)) {
      multiply(K_, rows, begin, n, sums_, sums_, {false, false}, ahead);
    } else {
      const Run run = {float_run_ == 0, float_run_ + n + block_ > kFloatRun};
      multiply(K_, rows, begin, n, float_sums_, sums_, run, ahead);
      float_run_ = run.last ? 0 : float_run_ + n;
    }
  }

  // Ends a run of sums in float early.
  void drain() {
    if (float_run_ == 0) return;
    for (std::size_t pair = 0; pair < num_pairs(K_); ++pair)
      add_widened(float_sums_ + pair * 2 * kLanes, sums_ + pair * kLanes);
    float_run_ = 0;
  }

  void flush() {
    if (filled_ == 0) return;
    if (block_in_float_)
      flush_as<float>();
    else
      flush_as<double>();
  }

  template <class E>
  void flush_as() {
    E* buffer = reinterpret_cast<E*>(buffer_);
    const std::int64_t padded = (filled_ + kStep - 1) / kStep * kStep;
    for (int i = 0; i < K_; ++i)
      for (std::int64_t c = filled_; c < padded; ++c) buffer[i * stride() + c] = 0;
    const E* const* rows = rows_of(buffer);
    multiply_block<E>(rows, 0, padded, rows);
    filled_ = 0;
  }

  template <class E>
  const E* const* rows_of(const E* buffer) {
    for (int i = 0; i < K_; ++i) buffer_rows_[i] = buffer + i * stride();
    return reinterpret_cast<const E* const*>(buffer_rows_);
  }

  std::int64_t stride() const { return block_ + kPad; }

  const RowTable& table_;
  const bool in_float_;
  double* const total_;  // a vector per pair of all tasks
  double* sums_;         // a vector per pair of the present ones,
  float* float_sums_;    // and what is not yet added to it
  double* buffer_;
  int K_ = 0;  // present rows, and which tasks they are
  int task_[kMaxTasks];
  std::int64_t block_ = 0, filled_ = 0, float_run_ = 0;
  bool block_in_float_ = false;
  const void* buffer_rows_[kMaxTasks];
};

}  // namespace

std::size_t gram_scratch(int num_tasks) {
  return 3 * num_pairs(num_tasks) * kLanes + static_cast<std::size_t>(num_tasks * (kMaxBlock + kPad));
}

void gram_chunk(const RowTable& rows, const Segment* segments, std::int64_t num_segments, bool in_float,
                double* scratch, double* partial) {
  ChunkGram chunk(rows, in_float, scratch);
  for (std::int64_t s = 0; s < num_segments; ++s) chunk.add(segments[s]);
  chunk.finish(partial);
}

}  // namespace mtl::cpu::MTL_ISA
