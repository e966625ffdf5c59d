#pragma once

// A sum of products as good as one taken with twice the digits and rounded once at the end: Dot2 of Ogita,
// Rump and Oishi, "Accurate sum and dot product" (2005). It needs a compiler that fuses no product with a sum
// of another statement (on the host -ffp-contract=off), else it is no better than a plain sum.

#include "mtl_kernels/team.h"

namespace mtl {

// x * y, rounded, whatever is done with it: nvcc would fuse it with a sum that follows.
MTL_HD double rounded_product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

class CompensatedSum {
 public:
  MTL_HD void add_product(double x, double y) {
    const double product = rounded_product(x, y);
    const double next = sum_ + product;
    const double shown = next - sum_;
    error_ += ((sum_ - (next - shown)) + (product - shown)) + fma(x, y, -product);
    sum_ = next;
  }
  MTL_HD double value() const { return sum_ + error_; }

 private:
  double sum_ = 0.0, error_ = 0.0;
};

}  // namespace mtl
