#pragma once

// The formulas of the operations that need the rows element by element. A number X is a double, or a vector
// of them, one in each lane.

#include <cstdint>

#include "mtl_kernels/philox.h"
#include "mtl_kernels/qualifiers.h"

namespace mtl {

// What makes one value of the K values of a column.
enum class ColumnOperation : std::int32_t { kGradDrop = 0, kTrimmedMean = 1 };

struct ColumnCall {
  ColumnOperation operation;
  int trim;                 // of kTrimmedMean
  const double* leak;       // [K], of kGradDrop; nullptr for zeros
  const std::int64_t* rng;  // (seed, step), of kGradDrop
};

// What a row does to its state.
enum class StateOperation : std::int32_t { kAverage = 0, kSquares = 1 };

struct StateCall {
  StateOperation operation;
  const double* keep;  // [groups, K], of kAverage
  const double* gain;  // [groups, K]
  double epsilon;      // of kSquares
};

// GradDrop of one column: sees its values in the order of the tasks. With p the sum of the positive values
// and n that of the negative ones, P = p / (p - n), so P > U where p (1 - U) > -n U: free of a division, and
// of what compilers could contract, so that every backend keeps the same signs. kLeaks: some task leaks.
template <class X, bool kLeaks>
class GradDrop {
 public:
  MTL_HD_LOCAL void add(X g, double leak) {
    const X zero{};
    positive_ += g < zero ? zero : g;  // a NaN as well
    negative_ += g < zero ? g : zero;
    if (kLeaks) {
      const X leaked = g * leak;
      up_ += g < zero ? leaked : g;
      down_ += g < zero ? g : leaked;
    }
  }
  // Neither sign is kept where all values are zero, and where one is NaN or two are infinite, which shows.
  MTL_HD_LOCAL X value(X threshold) const {
    const X up = kLeaks ? up_ : positive_, down = kLeaks ? down_ : negative_;
    const X for_up = positive_ * (1.0 - threshold), for_down = -(negative_ * threshold);
    const X neither = (up + down) - (positive_ + negative_);
    const X not_up = for_up < for_down ? down : neither;
    return for_up > for_down ? up : not_up;
  }

 private:
  X positive_{}, negative_{};  // sums
  X up_{}, down_{};            // the same with what the others leak
};

// The four words that decide elements 4 n to 4 n + 3.
MTL_HD_LOCAL Philox4 threshold_words(const std::int64_t* rng, std::uint64_t n) {
  return philox_at(rng, static_cast<std::uint32_t>(n >> 32), static_cast<std::uint32_t>(n));
}
MTL_HD_LOCAL double threshold_of(std::uint32_t word) { return (word + 0.5) * 0x1p-32; }

// Whether n values are sorted faster than `trim` of them are brought to either end, one after the other.
MTL_HD_LOCAL bool sorts_faster(int n, int trim) {
  int log = 0;
  while (1 << log < n) ++log;
  return trim * (2 * n - 1 - 2 * trim) > n * log * (log - 1) / 4 + n - 1;
}

// Moves the smallest `trim` of n values to the front and the largest to the back, where exchange(i, j), i <
// j, leaves the smaller one of two at i. The same exchanges for all values: with a sorting network that fits
// any n (merge exchange: Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M), or fewer of
// them.
template <class Exchange>
MTL_HD_LOCAL void move_extremes(int n, int trim, Exchange exchange) {
  if (!sorts_faster(n, trim)) {
    for (int k = 0; k < trim; ++k) {
      for (int i = k; i < n - 1 - k; ++i) exchange(i, i + 1);
      for (int i = n - 2 - k; i > k; --i) exchange(i - 1, i);
    }
    return;
  }
  int top = 1;
  while (2 * top < n) top *= 2;
  for (int p = top; p > 0; p /= 2) {
    for (int q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int i = 0; i < n - d; ++i)
        if ((i & p) == r) exchange(i, i + d);
      if (q == p) break;
    }
  }
}

// s <- keep s + gain g, and s^2. An operand with the factor 0 is given as zero, whatever it holds.
struct Average {
  double keep, gain;

  MTL_HD_LOCAL bool reads_row() const { return gain != 0.0; }
  MTL_HD_LOCAL bool reads_state() const { return keep != 0.0; }
  MTL_HD_LOCAL bool writes() const { return keep != 1.0 || gain != 0.0; }
  template <class X>
  MTL_HD_LOCAL X next(X s, X g) const {
    return s * keep + g * gain;
  }
  template <class X, class Root>
  MTL_HD_LOCAL X term(X s, X, Root) const {
    return s * s;
  }
};

// s <- s + gain g^2, and g^2 / sqrt(s + epsilon).
struct SumOfSquares {
  double gain, epsilon;

  MTL_HD_LOCAL bool reads_row() const { return true; }
  MTL_HD_LOCAL bool reads_state() const { return true; }
  MTL_HD_LOCAL bool writes() const { return gain != 0.0; }
  template <class X>
  MTL_HD_LOCAL X next(X s, X g) const {
    return s + g * g * gain;
  }
  template <class X, class Root>
  MTL_HD_LOCAL X term(X s, X g, Root root) const {
    return g * g / root(s + epsilon);
  }
};

// Calls `use` with the update of task k (of its group: `place` is group K + k).
template <class Use>
MTL_HD_LOCAL auto with_update(const StateCall& call, std::int64_t place, Use use) {
  if (call.operation == StateOperation::kSquares) return use(SumOfSquares{call.gain[place], call.epsilon});
  return use(Average{call.keep[place], call.gain[place]});
}

}  // namespace mtl
