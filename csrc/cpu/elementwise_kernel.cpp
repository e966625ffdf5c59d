// The operations on the rows element by element, over one segment of columns, on one thread.
//
// Elements of whatever dtype are widened to numbers in the first-level cache, a block of columns at a time;
// what is made of them there is rounded once, when it is written. So an operation is compiled once, and not
// for every dtype.
#include "kernels.h"
#include "mtl_kernels/elementwise.h"
#include "simd.h"

namespace mtl::cpu::MTL_ISA {
namespace {

// Calls `use` with a pointer to elements of the dtype.
template <class Use>
inline auto with_elements(const Elements& elements, Use use) {
  switch (elements.dtype) {
    case DType::kFloat32:
      return use(reinterpret_cast<float*>(elements.address));
    case DType::kFloat64:
      return use(reinterpret_cast<double*>(elements.address));
    case DType::kBFloat16:
      return use(reinterpret_cast<BFloat16*>(elements.address));
    default:
      return use(reinterpret_cast<Float16*>(elements.address));
  }
}

// Elements as doubles or floats, as many as the pointer before them says.
template <class T>
inline Vec load_as(const double*, const T* p) {
  return load(p);
}
template <class T>
inline VecF load_as(const float*, const T* p) {
  return load_floats(p);
}
template <class T>
inline Vec load_part_as(const double*, const T* p, std::int64_t n) {
  return load_part(p, n);
}
template <class T>
inline VecF load_part_as(const float*, const T* p, std::int64_t n) {
  return load_floats_part(p, n);
}
// Room for numbers that are like those of the elements pointed to: doubles, or floats where these are exact.
inline double* numbers_for(const double*, double* room) { return room; }
template <class T>
inline float* numbers_for(const T*, double* room) {
  return reinterpret_cast<float*>(room);
}
template <class Number>
constexpr int kLanesOf = kLanes * static_cast<int>(sizeof(double) / sizeof(Number));

// Elements [begin, begin + n) of R rows as numbers, side by side, so that the processor fetches R streams
// ahead; to[r] is `stride` after to[r - 1].
template <int R, class T, class Number>
void widen(const std::uintptr_t* rows, std::int64_t begin, std::int64_t n, Number* to, std::int64_t stride) {
  constexpr int kStep = kLanesOf<Number>;
  const T* from[R];
  for (int r = 0; r < R; ++r) from[r] = reinterpret_cast<const T*>(rows[r]) + begin;
  std::int64_t c = 0;
  for (; c + kStep <= n; c += kStep)
    for (int r = 0; r < R; ++r) store(to + r * stride + c, load_as(to, from[r] + c));
  if (c < n)
    for (int r = 0; r < R; ++r) store(to + r * stride + c, load_part_as(to, from[r] + c, n - c));
}

// The same of any number of rows, of elements like the one pointed to, and zeros for those at address 0.
template <class T, class Number>
void widen_rows(const T*, const std::uintptr_t* rows, int num_rows, std::int64_t begin, std::int64_t n,
                Number* to, std::int64_t stride) {
  for (int r = 0; r < num_rows;) {
    int there = 0;
    while (there < 8 && r + there < num_rows && rows[r + there] != 0) ++there;
    Number* first = to + r * stride;
    if (there == 0) {
      for (std::int64_t c = 0; c < stride; ++c) first[c] = 0;
      r += 1;
    } else if (there == 8) {
      widen<8, T>(rows + r, begin, n, first, stride);
      r += 8;
    } else if (there >= 4) {
      widen<4, T>(rows + r, begin, n, first, stride);
      r += 4;
    } else if (there >= 2) {
      widen<2, T>(rows + r, begin, n, first, stride);
      r += 2;
    } else {
      widen<1, T>(rows + r, begin, n, first, stride);
      r += 1;
    }
  }
}

template <class T>
void narrow(const double* from, std::int64_t n, T* to) {
  std::int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store(to + c, load(from + c));
  if (c < n) store_part(to + c, load(from + c), n - c);
}

// Columns of a block: K rows of them, widened, stay in the nearer caches.
constexpr std::int64_t kTileDoubles = 4096, kMostColumns = 512, kFewestColumns = 64;

constexpr std::int64_t tile_columns(int num_tasks) {
  const std::int64_t columns = kTileDoubles / num_tasks / (2 * kLanes) * (2 * kLanes);
  return columns < kFewestColumns ? kFewestColumns : columns > kMostColumns ? kMostColumns : columns;
}

// The thresholds of n elements from `first` on; there is room for three more before and after them. Returns
// where the first one is.
const double* draw_thresholds(const std::int64_t* rng, std::int64_t first, std::int64_t n, double* room) {
  const auto begin = static_cast<std::uint64_t>(first);
  const std::uint64_t end = (begin + static_cast<std::uint64_t>(n) + 3) / 4;
  double* to = room;
  for (std::uint64_t at = begin / 4; at < end; ++at, to += 4) {
    const Philox4 words = threshold_words(rng, at);
    for (int i = 0; i < 4; ++i) to[i] = threshold_of(words.word[i]);
  }
  return room + begin % 4;
}

template <bool kLeaks>
void grad_drop(const double* tile, std::int64_t stride, int num_rows, const double* leaks,
               const double* thresholds, std::int64_t n, double* out) {
  for (std::int64_t c = 0; c < n; c += kLanes) {
    GradDrop<Vec, kLeaks> column;
    for (int k = 0; k < num_rows; ++k) column.add(load(tile + k * stride + c), leaks[k]);
    store(out + c, column.value(load(thresholds + c)));
  }
}

inline Vec load_lanes(const double* p) { return load(p); }
inline VecF load_lanes(const float* p) { return load_floats(p); }

template <class Number>
inline void exchange(Number* __restrict low, Number* __restrict high, std::int64_t n) {
  for (std::int64_t c = 0; c < n; c += kLanesOf<Number>) {
    const auto a = load_lanes(low + c), b = load_lanes(high + c);
    store(low + c, lesser(a, b));
    store(high + c, greater(b, a));
  }
}

// `unordered`: room for one number a column, which is NaN where a value of the column is, else 0.
template <class Number>
void trimmed_mean(Number* tile, std::int64_t stride, int num_tasks, int trim, std::int64_t n,
                  Number* unordered, double* out) {
  for (std::int64_t c = 0; c < n; c += kLanesOf<Number>) {
    auto found = decltype(load_lanes(tile)){};
    for (int k = 0; k < num_tasks; ++k) {
      const auto x = load_lanes(tile + k * stride + c);
      found = x == x ? found : x;
    }
    store(unordered + c, found);
  }
  move_extremes(num_tasks, trim, [&](int i, int j) { exchange(tile + i * stride, tile + j * stride, n); });
  const double count = num_tasks - 2 * trim;
  for (std::int64_t c = 0; c < n; c += kLanes) {
    Vec sum{};
    for (int k = trim; k < num_tasks - trim; ++k) sum += load(tile + k * stride + c);
    store(out + c, sum / count + load(unordered + c));
  }
}

Vec square_root(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// n elements of a state, and of a row or nullptr.
template <class Update, class T, class S>
double update(const Update& update, const T* row, S* state, std::int64_t n) {
  const bool reads_row = row != nullptr && update.reads_row();
  Vec sums[2] = {};
  const auto step = [&](Vec g, Vec s, std::int64_t c, std::int64_t length, Vec* sum) {
    if (!update.reads_state()) s = Vec{};
    if (update.writes()) {
      s = update.next(s, g);
      if (length == kLanes) {
        store(state + c, s);
        s = load(state + c);
      } else {
        store_part(state + c, s, length);
        s = load_part(state + c, length);
      }
    }
    *sum += update.term(s, g, square_root);
  };
  std::int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes)
    for (int i = 0; i < 2; ++i) {
      const std::int64_t at = c + i * kLanes;
      step(reads_row ? load(row + at) : Vec{}, load(state + at), at, kLanes, &sums[i]);
    }
  for (; c < n; c += kLanes) {
    const std::int64_t left = n - c < kLanes ? n - c : kLanes;
    step(reads_row ? load_part(row + c, left) : Vec{}, load_part(state + c, left), c, left, &sums[0]);
  }
  return sum(sums[0] + sums[1]);
}

}  // namespace

std::size_t reduce_scratch(int num_tasks) {
  const std::int64_t columns = tile_columns(num_tasks);
  return static_cast<std::size_t>(columns * (num_tasks + 2) + 8);
}

void reduce_segment(const RowTable& table, const Segment& segment, const ColumnCall& call, std::int64_t first,
                    std::uintptr_t out, double* scratch) {
  const std::int64_t stride = tile_columns(table.num_tasks);
  const bool drops = call.operation == ColumnOperation::kGradDrop;
  std::uintptr_t rows[kMaxTasks];
  double leaks[kMaxTasks];
  int num_rows = 0;
  for (int k = 0; k < table.num_tasks; ++k) {
    const std::uintptr_t row = table.pointers[k * table.num_params + segment.param];
    if (drops && row == 0) continue;
    rows[num_rows] = row;
    leaks[num_rows++] = drops && call.leak != nullptr ? call.leak[k] : 0.0;
  }
  double *results = scratch, *room = results + stride, *tile = room + stride + 8;
  const std::int64_t end = segment.begin + segment.length;
  with_elements({out, table.dtypes[segment.param]}, [&](auto* to) {
    for (std::int64_t begin = segment.begin; begin < end; begin += stride) {
      const std::int64_t n = end - begin < stride ? end - begin : stride;
      if (drops) {
        widen_rows(to, rows, num_rows, begin, n, tile, stride);
        (call.leak == nullptr ? grad_drop<false>
                              : grad_drop<true>)(tile, stride, num_rows, leaks,
                                                 draw_thresholds(call.rng, first + begin, n, room), n,
                                                 results);
      } else {
        auto* numbers = numbers_for(to, tile);
        widen_rows(to, rows, num_rows, begin, n, numbers, stride);
        trimmed_mean(numbers, stride, num_rows, call.trim, n, numbers_for(to, room), results);
      }
      narrow(results, n, to + begin);
    }
  });
}

double update_segment(const Elements& row, const Elements& state, std::int64_t begin, std::int64_t length,
                      const StateCall& call, std::int64_t place) {
  return with_update(call, place, [&](const auto& found) {
    return with_elements(state, [&](auto* to) {
      return with_elements(row, [&](const auto* from) {
        return update(found, row.address == 0 ? nullptr : from + begin, to + begin, length);
      });
    });
  });
}

}  // namespace mtl::cpu::MTL_ISA
