#pragma once

#include "mtl_kernels/rows.h"

namespace mtl::cpu {

// Writes sum_k weights[group of p][k] * row k to out[p] for every parameter p; out[p] = 0 skips it. out[p]
// may be the address of one of the parameter's rows, but may not overlap any other row or output.
void combine(const RowTable& rows, const double* weights, const std::uintptr_t* out, int threads);

}  // namespace mtl::cpu
