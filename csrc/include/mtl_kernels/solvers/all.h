#pragma once

// The one list of solvers; every backend instantiates from it.

#include "mtl_kernels/solvers/aligned_mtl.h"
#include "mtl_kernels/solvers/config.h"
#include "mtl_kernels/solvers/imtl_g.h"
#include "mtl_kernels/solvers/min_norm.h"
#include "mtl_kernels/solvers/pcgrad.h"

namespace mtl {

template <class... Solvers>
struct SolverList {};

using AllSolvers = SolverList<Pcgrad, MinNorm, AlignedMtl, Config, ImtlG>;

}  // namespace mtl
