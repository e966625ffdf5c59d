#pragma once

// Random loss weighting (Lin et al. 2021, arXiv 2111.10603): a random point of the simplex, whatever the rows
// are.
//   options: {distribution}: 0 softmax of normal numbers, 1 uniform numbers over their sum, 2 Dirichlet with
//     concentration 1, 3 equal weights on a random subset, all tasks where it is empty
//   rng: {seed, step}
//   certificate: {0, 0}
// Task k of problem b draws from the Philox position (b, 4096 + k): the orders of PCGrad end below it.

#include "mtl_kernels/philox.h"
#include "mtl_kernels/solver.h"

namespace mtl {

struct RandomWeights {
  static constexpr const char* name = "random_weights";
  static constexpr int num_options = 1;
  static constexpr bool independent_rows = false;
  MTL_HD static bool needs_rng(const double*) { return true; }
  MTL_HD static constexpr std::size_t scratch_doubles(int) { return 0; }
  MTL_HD static constexpr std::size_t state_doubles(int) { return 0; }

  template <class Team>
  MTL_HD static void solve(const Team& team, const Problem& p) {
    const int num_active = begin(team, p);
    if (num_active == 0) return;
    double partial = 0.0;
    for (int k = team.rank(); k < p.num_tasks; k += team.size()) {
      p.weights[k] = p.is_active(k) ? draw(p, k) : 0.0;
      partial += p.weights[k];
    }
    const double total = team.sum(partial);
    for (int k = team.rank(); k < p.num_tasks; k += team.size())
      p.weights[k] = total > 0.0 ? p.weights[k] / total : p.is_active(k) ? 1.0 / num_active : 0.0;
    set_certificate(team, p, 0.0, 0);
    team.sync();
  }

 private:
  // Strictly between 0 and 1, of 52 bits and a half.
  MTL_HD static double uniform(std::uint32_t high, std::uint32_t low) {
    return (static_cast<double>(high >> 6) * 67108864.0 + static_cast<double>(low >> 6) + 0.5) /
           4503599627370496.0;
  }

  // cos of 2 pi x; CUDA's cos would keep room in local memory for arguments of any size.
  MTL_HD static double cosine_of_turn(double x) {
#if defined(__CUDA_ARCH__)
    return cospi(2.0 * x);
#else
    return cos(6.283185307179586 * x);
#endif
  }

  MTL_HD static double draw(const Problem& p, int task) {
    const Philox4 words =
        philox_at(p.rng, static_cast<std::uint32_t>(p.index), static_cast<std::uint32_t>(4096 + task));
    const double u = uniform(words.word[0], words.word[1]);
    const double kind = p.options[0];
    if (kind == 1.0) return u;
    if (kind == 2.0) return -log(u);
    if (kind == 3.0) return u < 0.5 ? 1.0 : 0.0;
    // Box and Muller; |z| < 9, so that exp needs no shift.
    return exp(sqrt(-2.0 * log(u)) * cosine_of_turn(uniform(words.word[2], words.word[3])));
  }
};

}  // namespace mtl
