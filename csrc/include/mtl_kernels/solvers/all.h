#pragma once

// The one list of solvers; every backend instantiates from it.

#include "mtl_kernels/solvers/aligned_mtl.h"
#include "mtl_kernels/solvers/cagrad.h"
#include "mtl_kernels/solvers/config.h"
#include "mtl_kernels/solvers/dual_cone.h"
#include "mtl_kernels/solvers/fair.h"
#include "mtl_kernels/solvers/gradvac.h"
#include "mtl_kernels/solvers/imtl_g.h"
#include "mtl_kernels/solvers/krum.h"
#include "mtl_kernels/solvers/min_norm.h"
#include "mtl_kernels/solvers/pcgrad.h"
#include "mtl_kernels/solvers/random_weights.h"
#include "mtl_kernels/solvers/stochastic.h"

namespace mtl {

template <class... Solvers>
struct SolverList {
  static constexpr int kSize = sizeof...(Solvers);

  // These, and then more.
  template <class... More>
  using Then = SolverList<Solvers..., More...>;
};

// Also run at the end of a gram kernel, in its launch. All gram kernels hold all of these: each takes time to
// compile, and registers where it needs many. The others are a launch of their own.
using FusedSolvers = SolverList<MinNorm, Pcgrad>;

using AllSolvers = FusedSolvers::Then<AlignedMtl, Cagrad, Config, Dualproj, FairGrad, Gradvac, ImtlG, Krum,
                                      Modo, NashMtl, Pcd, RandomWeights, Sdmgrad, Upgrad>;

}  // namespace mtl
