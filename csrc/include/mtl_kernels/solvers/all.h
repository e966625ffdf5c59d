#pragma once

// The one list of solvers; every backend instantiates from it.

#include "mtl_kernels/solvers/min_norm.h"
#include "mtl_kernels/solvers/pcgrad.h"
#include "mtl_kernels/solvers/stochastic.h"

namespace mtl {

template <class... Solvers>
struct SolverList {};

using AllSolvers = SolverList<Pcgrad, MinNorm, Sdmgrad, Modo>;

}  // namespace mtl
