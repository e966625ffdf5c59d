#pragma once

#include "mtl_kernels/elementwise.h"
#include "mtl_kernels/rows.h"

namespace mtl::cpu {

// Writes what the call makes of the K values of every element to out[p], of the dtype of the rows; 0 = none
// for this parameter. An output may be one of the parameter's rows, but may not overlap any other row or
// output.
void reduce_columns(const RowTable& rows, const ColumnCall& call, const std::uintptr_t* out, int threads);

// Updates every tensor of the state, whose table says sizes and groups, and writes the sums [groups, K].
// Where a row is absent (0 in `rows`, [K, P]) it is read as zeros. The sums depend on the instruction set,
// not on the number of threads.
void update_state(const RowTable& state, const std::uintptr_t* rows, const DType* row_dtypes, int num_groups,
                  const StateCall& call, double* sums, int threads);

}  // namespace mtl::cpu
