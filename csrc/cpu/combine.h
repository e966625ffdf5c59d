#pragma once

#include "mtl_kernels/rows.h"

namespace mtl::cpu {

// Where a combination goes.
struct Outputs {
  const std::uintptr_t* pointers;  // [P], 0 = none for this parameter
  const DType* dtypes;             // [P]
  bool accumulate;                 // add to what is there
};

// Writes or adds sum_k weights[group of p][k] * row k to every output p. An output that is neither of another
// dtype nor added to may be one of the parameter's rows, but may not overlap any other row or output.
void combine(const RowTable& rows, const double* weights, const Outputs& out, int threads);

}  // namespace mtl::cpu
