// What csrc/cuda/ptx.h does in PTX, on the host.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda_emulation.h"

namespace mtl::cuda {

inline float half_to_float(std::uint16_t bits) {
  return static_cast<float>(emulation::bits_as<_Float16>(bits));
}

inline std::uint16_t float_to_half(float x) {
  return emulation::bits_as<std::uint16_t>(static_cast<_Float16>(x));
}

// Like the instruction, which makes one NaN of all.
inline std::uint16_t float_to_bfloat16(float x) {
  const auto bits = emulation::bits_as<std::uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <int kBytes>
void copy_async(void* shared, const void* global, int valid) {
  emulation::copy_async(shared, global, kBytes, valid);
}

inline void copy_commit() { emulation::copy_commit(); }

template <int kLeft>
void copy_wait() {
  emulation::copy_wait(kLeft);
}

inline unsigned arrive(unsigned* counter) { return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL); }

inline int opaque(int x) { return x; }

inline void* global_memory(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

inline double join_double(unsigned low, unsigned high) {
  return emulation::bits_as<double>(std::uint64_t{high} << 32 | low);
}

// The fragments of one lane. With g = lane / 4 and t = lane % 4, C is held in rows g (c[0], c[1]) and g + 8,
// in columns 2 t and 2 t + 1.
template <int n>
struct DoubleFragments {
  double a[2][n], b[n];  // A(g, t + 4 i), A(g + 8, t + 4 i), B(t + 4 i, g)
};
struct HalfFragments {
  unsigned a[4],
      b[2];  // pairs of columns 2 t, 2 t + 1 of A(g, .), A(g + 8, .), then those of 2 t + 8, 2 t + 9
};

// One column of A after the other; the hardware may add in another order.
template <int n>
void mma_double(double (&c)[4], const double (&a0)[n], const double (&a1)[n], const double (&b)[n]) {
  DoubleFragments<n> mine;
  std::copy_n(a0, n, mine.a[0]);
  std::copy_n(a1, n, mine.a[1]);
  std::copy_n(b, n, mine.b);
  const DoubleFragments<n>* lanes = emulation::warp_exchange(mine, "mma");
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 4 * n; ++k)
      c[i] += lanes[lane / 4 * 4 + k % 4].a[i / 2][k / 4] * lanes[column * 4 + k % 4].b[k / 4];
  }
}

inline void mma_double_eight(double& c0, double& c1, double a, double b) {
  double c[4] = {c0, c1, 0.0, 0.0};
  mma_double<1>(c, {a}, {0.0}, {b});
  c0 = c[0];
  c1 = c[1];
}

// The tensor cores add exact products and cut the sum off toward zero; here once for all 16.
template <class ToFloat>
void mma_half(float (&c)[4], const HalfFragments& mine, ToFloat to_float) {
  const HalfFragments* lanes = emulation::warp_exchange(mine, "mma");
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    double total = c[i];
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, half = k % 2 * 16;
      const unsigned a = lanes[lane / 4 * 4 + holder].a[i / 2 + k / 8 * 2];
      const unsigned b = lanes[column * 4 + holder].b[k / 8];
      total += static_cast<double>(to_float(static_cast<std::uint16_t>(a >> half))) *
               static_cast<double>(to_float(static_cast<std::uint16_t>(b >> half)));
    }
    c[i] = std::fabs(total) <= FLT_MAX ? __double2float_rz(total) : static_cast<float>(total);
  }
}

inline void mma_bfloat16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                         unsigned b1) {
  mma_half(c, {{a0, a1, a2, a3}, {b0, b1}},
           [](std::uint16_t bits) { return emulation::bits_as<float>(std::uint32_t{bits} << 16); });
}

inline void mma_float16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                        unsigned b1) {
  mma_half(c, {{a0, a1, a2, a3}, {b0, b1}}, half_to_float);
}

}  // namespace mtl::cuda
