#pragma once

#include "mtl_kernels/rows.h"

namespace mtl::cpu {

// Writes the Gram matrix of each group of parameters to out[num_groups][K][K]. The result depends on the rows
// and the instruction set alone, not on the number of threads.
void gram(const RowTable& rows, int num_groups, double* out, int threads);

}  // namespace mtl::cpu
