// Lets g++ and clang++ compile CUDA kernels for the host. Stands in for <cuda_runtime.h>: `emulated_launch`
// (launch.h) stands in for the <<<>>> of a launch, `emulation::dynamic_shared` for extern __shared__.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>  // uses __noinline__ as the name of an attribute: before it becomes a macro

#include "launch.h"
#include "shared_memory.h"

#define __global__ __attribute__((abi_tag(EMULATION_KERNEL_TAG)))
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, in the whole process. `alignas` goes before __shared__, __align__ after it.
#define __shared__ static __attribute__((abi_tag(EMULATION_SHARED_TAG)))

using std::max;
using std::min;

inline void __syncthreads(emulation::Where where = emulation::Where::here()) {
  emulation::block_barrier("__syncthreads", false, where);
}
inline int __syncthreads_or(int predicate, emulation::Where where = emulation::Where::here()) {
  return emulation::block_barrier("__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, emulation::Where where = emulation::Where::here()) {
  return emulation::block_barrier("__syncthreads_and", predicate == 0, where) == 0;
}
inline int __syncthreads_count(int predicate, emulation::Where where = emulation::Where::here()) {
  return emulation::block_barrier("__syncthreads_count", predicate != 0, where);
}
inline void __syncwarp(unsigned mask = emulation::kFullWarp,
                       emulation::Where where = emulation::Where::here()) {
  emulation::warp_barrier(mask, where);
}

namespace emulation {

// The value of lane `source`, or the own one where that lies outside the segment of `width` lanes.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, int first, int last, Where where) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8));
  const T* deposits = warp_exchange(value, name, mask, where);
  return deposits[source >= first && source <= last ? source : lane()];
}

template <class T>
T* aligned(T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) fail("misaligned address");
  return address;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulation::Where where = emulation::Where::here()) {
  const int first = emulation::lane() / width * width;
  return emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), 0, 31, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulation::Where where = emulation::Where::here()) {
  const int last = emulation::lane() / width * width + width - 1;
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::lane() ^ lane_mask, 0, last, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulation::Where where = emulation::Where::here()) {
  const int last = emulation::lane() / width * width + width - 1;
  return emulation::shuffle("__shfl_down_sync", mask, value, emulation::lane() + static_cast<int>(delta), 0,
                            last, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulation::Where where = emulation::Where::here()) {
  const int first = emulation::lane() / width * width;
  return emulation::shuffle("__shfl_up_sync", mask, value, emulation::lane() - static_cast<int>(delta), first,
                            31, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Where where = emulation::Where::here()) {
  const int* deposits = emulation::warp_exchange(predicate, "__ballot_sync", mask, where);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(deposits[i] != 0) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, emulation::Where where = emulation::Where::here()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulation::Where where = emulation::Where::here()) {
  return __ballot_sync(mask, predicate, where) == emulation::kFullWarp;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value,
                                  emulation::Where where = emulation::Where::here()) {
  const unsigned* deposits = emulation::warp_exchange(value, "__reduce_min_sync", mask, where);
  return *std::min_element(deposits, deposits + 32);
}

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }

// Relaxed, as in CUDA: without fences on both sides they order no other memory.
namespace emulation {

template <class T, class F>
T atomic_update(T* address, F next) {
  aligned(address);
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = next(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  after_atomic(address);
  return old;
}

}  // namespace emulation

template <class T>
T atomicAdd(T* address, typename std::common_type<T>::type value) {
  return emulation::atomic_update(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicExch(T* address, typename std::common_type<T>::type value) {
  return emulation::atomic_update(address, [&](T) { return value; });
}
template <class T>
T atomicOr(T* address, typename std::common_type<T>::type value) {
  return emulation::atomic_update(address, [&](T old) { return old | value; });
}
template <class T>
T atomicMax(T* address, typename std::common_type<T>::type value) {
  return emulation::atomic_update(address, [&](T old) { return old < value ? value : old; });
}
// Counts to `last`, then starts at 0 again.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulation::atomic_update(address, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

template <class T>
T __ldg(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
T __ldcg(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
T __ldcs(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
void __stcg(T* address, typename std::common_type<T>::type value) {
  *emulation::aligned(address) = value;
}
template <class T>
void __stcs(T* address, typename std::common_type<T>::type value) {
  *emulation::aligned(address) = value;
}

namespace emulation {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_as<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __double2float_rz(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) && !std::isinf(x)
             ? std::nextafter(nearest, 0.0f)
             : nearest;
}
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
