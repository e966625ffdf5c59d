#pragma once

// Every instruction that has no name in CUDA C++: PTX on a device, a twin of the same meaning in the
// emulation.

#include "device.h"

#if defined(MTL_EMULATION)
#include "ptx_twins.h"
#else

namespace mtl::cuda {

__device__ __forceinline__ float half_to_float(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ std::uint16_t float_to_half(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ std::uint16_t float_to_bfloat16(float x) {
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Starts the copy of the first `valid` of kBytes (4, 8 or 16) to shared memory, zeros for the rest; both
// addresses are multiples of kBytes. With valid = 0 nothing is read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes),
                 "r"(valid)
                 : "memory");
  }
}

// Closes a group of copies, maybe an empty one.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but not for the newest kLeft groups.
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Adds one to a counter in global memory and tells what it was. What this thread wrote, or saw behind a
// barrier, comes before it for every thread that finds the counter raised; what those did comes before what
// this thread does next.
__device__ __forceinline__ unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}

// x, of which the compiler knows nothing: what is computed from it stays where it is, instead of in registers
// that a loop needs.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The global memory at an address that came as a number. Said this way, the compiler knows that it is global.
__device__ __forceinline__ void* global_memory(std::uintptr_t address) {
  return __cvta_global_to_generic(address);
}

__device__ __forceinline__ double join_double(unsigned low, unsigned high) {
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}

// The fragments of the tensor cores. With g = lane / 4 and t = lane % 4, for a 16 x k by k x 8 product:
//   a[0], a[1]: rows g and g + 8 of A; b: column g of B; c[0], c[1]: row g, columns 2 t and 2 t + 1 of C;
//   c[2], c[3]: the same of row g + 8.
// A lane that holds elements of row g of a matrix X therefore holds them as A and as B = X' alike.

// C += A B in double of eight rows of A, k = 4: a lane holds column t of row g of A, and row t of B.
__device__ __forceinline__ void mma_double_eight(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}

// C += A B in double, k = 4 n with n = 2 or 4: a lane holds columns t, t + 4, ... of rows g (a0) and g + 8
// (a1) of A, and the same rows of B. One instruction where the hardware has it.
template <int n>
__device__ __forceinline__ void mma_double(double (&c)[4], const double (&a0)[n], const double (&a1)[n],
                                           const double (&b)[n]) {
  static_assert(n == 2 || n == 4, "16 bytes of a row are 2 or 4 elements");
#if __CUDA_ARCH__ >= 900
  if constexpr (n == 2) {
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a0[0]), "d"(a1[0]), "d"(a0[1]), "d"(a1[1]), "d"(b[0]), "d"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7,%8,%9,%10,%11}, "
        "{%12,%13,%14,%15}, {%0,%1,%2,%3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a0[0]), "d"(a1[0]), "d"(a0[1]), "d"(a1[1]), "d"(a0[2]), "d"(a1[2]), "d"(a0[3]), "d"(a1[3]),
          "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
  }
#else
#pragma unroll
  for (int i = 0; i < n; ++i) {
    mma_double_eight(c[0], c[1], a0[i], b[i]);
    mma_double_eight(c[2], c[3], a1[i], b[i]);
  }
#endif
}

// C += A B in float, k = 16: a0, a1 hold two columns of rows g and g + 8, a2, a3 two further columns; b0, b1
// the same of column g of B. Which columns those are does not matter as long as A and B agree.
__device__ __forceinline__ void mma_bfloat16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                             unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_float16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                            unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace mtl::cuda

#endif
