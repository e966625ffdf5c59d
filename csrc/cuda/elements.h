#pragma once

// Elements of the four row dtypes: 16 bytes of a row as words, one of its elements as a number, and a number
// rounded once to an element.

#include <type_traits>

#include "device.h"
#include "mtl_kernels/rows.h"
#include "ptx.h"

namespace mtl::cuda {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class T>
constexpr bool kIsHalf = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ double to_double(double x) { return x; }
template <class T>
__device__ __forceinline__ double to_double(T x) {
  return to_float(x);
}

// An element as the number that sums are kept in.
template <class Sum, class T>
__device__ __forceinline__ Sum to_number(T x) {
  if constexpr (std::is_same_v<Sum, float>) {
    return to_float(x);
  } else {
    return to_double(x);
  }
}

// x as a float that rounds to 16 bits as x itself does: cut off, with the last bit set if one of the last 41
// of x was. Where the cut leaves what is halfway between two elements, at most 12 digits long, those 41 are
// zero if x is halfway too; else what was cut off is among them, even of a subnormal float, which has 16
// digits from the least halfway case on. Anywhere else the last bit decides nothing. One conversion, which is
// what a GPU for computing does least of.
__device__ __forceinline__ float round_to_odd(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x));
  const unsigned rest = (static_cast<unsigned>(bits >> 32) & 0x1ffu) | static_cast<unsigned>(bits);
  return __uint_as_float(__float_as_uint(__double2float_rz(x)) | (rest != 0 ? 1u : 0u));
}
__device__ __forceinline__ float round_to_odd(float x) { return x; }

// x rounded once, to nearest, ties to even; a NaN stays one.
template <class T, class Sum>
__device__ __forceinline__ T rounded(Sum x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {float_to_bfloat16(round_to_odd(x))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {float_to_half(round_to_odd(x))};
  } else {
    return static_cast<T>(x);
  }
}

// Whether none of them is infinite or NaN: an exponent of all ones carries into the place of the sign. Two
// elements of 16 bits at a time, which share a register.
template <int kCount>
__device__ __forceinline__ bool all_finite(const double (&x)[kCount]) {
  unsigned carries = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(x[i]));
    carries |= (static_cast<unsigned>(bits >> 32) & 0x7fffffffu) + 0x00100000u;
  }
  return (carries & 0x80000000u) == 0;
}
template <int kCount>
__device__ __forceinline__ bool all_finite(const float (&x)[kCount]) {
  unsigned carries = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) carries |= (__float_as_uint(x[i]) & 0x7fffffffu) + 0x00800000u;
  return (carries & 0x80000000u) == 0;
}
template <class Half, int kCount>
__device__ __forceinline__ bool all_finite(const Half (&x)[kCount]) {
  constexpr unsigned kCarry = std::is_same_v<Half, BFloat16> ? 0x00800080u : 0x04000400u;
  unsigned carries = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const unsigned upper = i + 1 < kCount ? x[i + 1].bits : 0u;
    carries |= ((x[i].bits | upper << 16) & 0x7fff7fffu) + kCarry;
  }
  return (carries & 0x80008000u) == 0;
}

// Calls `use` with an element of the dtype, whose type is what matters.
template <class Use>
auto with_element(DType dtype, Use use) {
  switch (dtype) {
    case DType::kFloat32:
      return use(float{});
    case DType::kFloat64:
      return use(double{});
    case DType::kBFloat16:
      return use(BFloat16{});
    default:
      return use(Float16{});
  }
}

__device__ __forceinline__ void set_element(unsigned (&words)[4], int i, double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x));
  words[2 * i] = static_cast<unsigned>(bits);
  words[2 * i + 1] = static_cast<unsigned>(bits >> 32);
}
__device__ __forceinline__ void set_element(unsigned (&words)[4], int i, float x) {
  words[i] = __float_as_uint(x);
}
template <class Half>
__device__ __forceinline__ void set_element(unsigned (&words)[4], int i, Half x) {
  words[i / 2] |= static_cast<unsigned>(x.bits) << i % 2 * 16;
}

// 16 bytes of a row, the widest access of a thread. As words, so that two 16-bit elements share a register.
template <class T>
struct alignas(16) Vector {
  static constexpr int kElements = 16 / sizeof(T);

  unsigned words[4];

  __device__ __forceinline__ float number(int i) const {
    static_assert(sizeof(T) <= 4, "double has no float");
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      return half_to_float(static_cast<std::uint16_t>(i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16));
    }
  }
  __device__ __forceinline__ double exact(int i) const {
    if constexpr (sizeof(T) == 8) {
      return join_double(words[2 * i], words[2 * i + 1]);
    } else {
      return number(i);
    }
  }
  template <class Sum>
  __device__ __forceinline__ Sum as(int i) const {
    if constexpr (std::is_same_v<Sum, float>) {
      return number(i);
    } else {
      return exact(i);
    }
  }
};

// Elements side by side that go to memory, 16 bytes at once if there are as many.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];
};

// A row as the kernels see it: an address, 0 for a task that does not reach the parameter or does not exist.
__device__ __forceinline__ std::uintptr_t row_address(const std::uintptr_t* pointers, std::int64_t num_params,
                                                      int num_tasks, int k, int param) {
  // Unsigned: a sign extension of k would be one more register in every kernel.
  return k < num_tasks ? pointers[static_cast<unsigned>(k) * num_params + param] : 0;
}

template <class T>
__device__ __forceinline__ const T* element_at(std::uintptr_t row, std::int64_t column) {
  return static_cast<const T*>(global_memory(row)) + column;
}

// 16 bytes at an address that is a multiple of 16. A uint4 is what the compiler is sure to load at once.
template <class T>
__device__ __forceinline__ Vector<T> load_words(const void* address) {
  const uint4 words = *static_cast<const uint4*>(address);
  return {{words.x, words.y, words.z, words.w}};
}

// The same of a row; zeros where there is none.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(std::uintptr_t row, std::int64_t column) {
  if (row == 0) return {{0, 0, 0, 0}};
  return load_words<T>(element_at<T>(row, column));
}

// Elements `stride` apart, from `first` on, as far as they come before `end`; zeros otherwise. For columns
// that no 16 bytes hold: lanes side by side then read side by side.
template <class T>
__device__ __forceinline__ Vector<T> gather_elements(std::uintptr_t row, int first, int stride, int end) {
  Vector<T> found = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < Vector<T>::kElements; ++i) {
    const int column = first + i * stride;
    if (row != 0 && column < end) set_element(found.words, i, *element_at<T>(row, column));
  }
  return found;
}

// Whether squares of elements fit a float, given the bits of a row's words or-ed together: the row is zero,
// or one of its elements is at least 2^-63 (an exponent of 64 or more shows in one of two bits). What is too
// large shows in the sums. float16 always fits.
template <class T>
__device__ __forceinline__ bool in_float_range(unsigned bits) {
  if constexpr (std::is_same_v<T, Float16>) return true;
  if constexpr (std::is_same_v<T, float>) return (bits & 0x7fffffffu) == 0 || (bits & 0x60000000u) != 0;
  return (bits & 0x7fff7fffu) == 0 || (bits & 0x60006000u) != 0;
}

}  // namespace mtl::cuda
