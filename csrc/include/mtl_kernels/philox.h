#pragma once

// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011).

#include <cstdint>

#include "mtl_kernels/qualifiers.h"

namespace mtl {

struct Philox4 {
  std::uint32_t word[4];
};

MTL_HD_LOCAL Philox4 philox4x32_10(Philox4 counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * counter.word[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(p1),
                static_cast<std::uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<std::uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Four words of the stream (seed, step), at the position (hi, lo).
MTL_HD_LOCAL Philox4 philox_at(const std::int64_t* seed_step, std::uint32_t hi, std::uint32_t lo) {
  const auto seed = static_cast<std::uint64_t>(seed_step[0]);
  const auto step = static_cast<std::uint64_t>(seed_step[1]);
  const Philox4 counter = {
      {static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32), hi, lo}};
  return philox4x32_10(counter, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

}  // namespace mtl
