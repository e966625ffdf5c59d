#pragma once

// The workers that solve one small problem together. Solvers are templates over a Team, so the same lines run
// serially on a CPU and, with a warp or block team, on a GPU. Every rank calls every collective, in the same
// order; a collective is a barrier as well.
//
// Work on rows that do not depend on each other is dealt to squads instead. The kLanes lanes of a squad go in
// lockstep, and lane l keeps the l-th of kLanes equal parts of a row. What they exchange is no barrier. Or a
// squad works as a team of its own, `as_team`.

#include <math.h>

#include "mtl_kernels/qualifiers.h"

namespace mtl {

// A pointer that the compiler knows nothing about: what it computes from it here it does not keep in
// registers for the next place that starts from the same one.
template <class T>
MTL_HD T* opaque(T* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(p));
#endif
  return p;
}

struct IndexedValue {
  double value;
  int index;  // -1 when no rank offered one
};

// (value, index) of the smaller value; the lower index on a tie, so that the result does not depend on the
// team's size.
MTL_HD IndexedValue lesser(IndexedValue a, IndexedValue b) {
  if (b.index < 0) return a;
  if (a.index < 0) return b;
  return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

struct SerialTeam {
  MTL_HD int rank() const { return 0; }
  MTL_HD int size() const { return 1; }
  MTL_HD void sync() const {}
  MTL_HD double sum(double x) const { return x; }
  MTL_HD double min(double x) const { return x; }
  MTL_HD IndexedValue argmin(double value, int index) const { return {value, index}; }
  MTL_HD bool any(bool x) const { return x; }

  static constexpr int kLanes = 1;
  MTL_HD int squad() const { return 0; }
  MTL_HD int num_squads() const { return 1; }
  MTL_HD int lane() const { return 0; }
  MTL_HD double from_lane(double x, int) const { return x; }
  MTL_HD unsigned least(unsigned x) const { return x; }  // of the squad
  MTL_HD SerialTeam as_team() const { return {}; }       // the squad
};

}  // namespace mtl
