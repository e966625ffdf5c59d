#pragma once

// Elements of the four row dtypes: 16 bytes of a row as words, one of its elements as a number, and a double
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

__device__ __forceinline__ double to_double(double x) { return x; }
__device__ __forceinline__ double to_double(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ double to_double(BFloat16 x) { return to_float(x); }
__device__ __forceinline__ double to_double(Float16 x) { return to_float(x); }

// x rounded to a float whose last bit is sticky: a second rounding, to at most 22 bits, then gives what
// rounding x itself would have given.
__device__ __forceinline__ float round_to_odd(double x) {
  const float toward_zero = __double2float_rz(x);
  const bool exact = static_cast<double>(toward_zero) == x || x != x;
  return exact ? toward_zero : __uint_as_float(__float_as_uint(toward_zero) | 1u);
}

template <class T>
__device__ __forceinline__ T from_double(double x);
template <>
__device__ __forceinline__ double from_double<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ float from_double<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ Float16 from_double<Float16>(double x) {
  return {float_to_half(round_to_odd(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_double<BFloat16>(double x) {
  const unsigned bits = __float_as_uint(round_to_odd(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
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
};

// A row as the kernels see it: an address, 0 for a task that does not reach the parameter or does not exist.
__device__ __forceinline__ std::uintptr_t row_address(const std::uintptr_t* pointers, std::int64_t num_params,
                                                      int num_tasks, int k, int param) {
  return k < num_tasks ? pointers[k * num_params + param] : 0;
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
