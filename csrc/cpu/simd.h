// A vector of doubles, a vector of floats, and their conversions from and to the four row dtypes.
//
// Every file that includes this is compiled once per instruction set, with MTL_ISA naming the set; everything
// in here lives in a namespace of that name, so that the linker can never pick another set's copy of an
// inline function. For the same reason these files use nothing from the C++ library but plain types.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define MTL_UNROLL _Pragma("unroll")
#else
#define MTL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace mtl::cpu::MTL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif

using Vec = double __attribute__((vector_size(kLanes * sizeof(double))));
using VecF = float __attribute__((vector_size(kLanes * sizeof(double))));
// The same at any address.
typedef double LooseVec __attribute__((vector_size(kLanes * sizeof(double)), aligned(8), may_alias));
typedef float LooseVecF __attribute__((vector_size(kLanes * sizeof(double)), aligned(4), may_alias));

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vec broadcast(double x) { return Vec{} + x; }

// a * b + c, contracted to one fused operation where the instruction set has it (-ffp-contract=fast).
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }

inline double sum(Vec v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline Vec load(const double* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(double* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline VecF load_floats(const float* p) { return *reinterpret_cast<const LooseVecF*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<LooseVecF*>(p) = v; }

// A double becomes 16 bits by way of a float, and is still rounded once: where the float lies halfway between
// two 16-bit numbers, the one rounded to odd takes its place, towards zero and with what was cut off marked
// in the last bit. bfloat16 is a float's upper half; a float16 may be subnormal, so for it the mask leaves
// out some bits, and finds numbers that are not halfway as well.
constexpr int kHalfwayBFloat16 = 0x8000, kMaybeHalfwayFloat16 = 0x0fff;

// The lesser and the greater of two; where they are not ordered, b and b.
#if defined(__AVX512F__)
inline Vec lesser(Vec a, Vec b) { return _mm512_min_pd(a, b); }
inline Vec greater(Vec a, Vec b) { return _mm512_max_pd(a, b); }
inline VecF lesser(VecF a, VecF b) { return _mm512_min_ps(a, b); }
inline VecF greater(VecF a, VecF b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline Vec lesser(Vec a, Vec b) { return _mm256_min_pd(a, b); }
inline Vec greater(Vec a, Vec b) { return _mm256_max_pd(a, b); }
inline VecF lesser(VecF a, VecF b) { return _mm256_min_ps(a, b); }
inline VecF greater(VecF a, VecF b) { return _mm256_max_ps(a, b); }
#else
template <class V>
inline V lesser(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}
#endif

#if defined(__AVX512F__)

inline Vec load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
inline Vec load(const Float16* p) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline VecF load_floats(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline VecF load_floats(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256 to_odd_floats(Vec v) {
  const __m256 cut = _mm512_cvt_roundpd_ps(v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd(cut), v, _CMP_NEQ_OQ);
  const __m256i bits = _mm256_castps_si256(cut);
  return _mm256_castsi256_ps(_mm256_mask_or_epi32(bits, inexact, bits, _mm256_set1_epi32(1)));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
inline void store(Float16* p, Vec v) {
  __m256 x = _mm512_cvtpd_ps(v);
  const __m256i bits = _mm256_castps_si256(x);
  if ((_mm256_testn_epi32_mask(bits, _mm256_set1_epi32(kMaybeHalfwayFloat16)) &
       _mm256_test_epi32_mask(bits, _mm256_set1_epi32(0x7fffffff))) != 0)
    x = to_odd_floats(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec v) {
  __m256 x = _mm512_cvtpd_ps(v);
  __m256i bits = _mm256_castps_si256(x);
  if (_mm256_cmpeq_epi32_mask(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff)),
                              _mm256_set1_epi32(kHalfwayBFloat16)) != 0) {
    x = to_odd_floats(v);
    bits = _mm256_castps_si256(x);
  }
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi16(_mm256_srli_epi32(rounded, 16)));
}
// Past the caches; p must be aligned to the size of what is written.
inline void stream(double* p, Vec v) { _mm512_stream_pd(p, v); }
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, _mm512_cvtpd_ps(v)); }
inline void stream_fence() { _mm_sfence(); }

#elif defined(__AVX2__)

inline Vec load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline Vec load(const BFloat16* p) {
  const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
}
inline Vec load(const Float16* p) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline VecF load_floats(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline VecF load_floats(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The lower half of each lane of a mask.
inline __m128i narrow_mask(__m256d mask) {
  const __m128 low = _mm_castpd_ps(_mm256_castpd256_pd128(mask));
  const __m128 high = _mm_castpd_ps(_mm256_extractf128_pd(mask, 1));
  return _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
}
inline __m128 to_odd_floats(Vec v) {
  const __m128 nearest = _mm256_cvtpd_ps(v);
  const __m256d back = _mm256_cvtps_pd(nearest), sign = _mm256_set1_pd(-0.0);
  const __m128i inexact = narrow_mask(_mm256_cmp_pd(back, v, _CMP_NEQ_OQ));
  const __m128i away =
      narrow_mask(_mm256_cmp_pd(_mm256_andnot_pd(sign, back), _mm256_andnot_pd(sign, v), _CMP_GT_OQ));
  const __m128i bits = _mm_add_epi32(_mm_castps_si128(nearest), away);
  return _mm_castsi128_ps(_mm_or_si128(bits, _mm_srli_epi32(inexact, 31)));
}
inline void store(float* p, Vec v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
inline void store(Float16* p, Vec v) {
  __m128 x = _mm256_cvtpd_ps(v);
  const __m128i low = _mm_and_si128(_mm_castps_si128(x), _mm_set1_epi32(kMaybeHalfwayFloat16));
  const __m128 maybe = _mm_castsi128_ps(_mm_cmpeq_epi32(low, _mm_setzero_si128()));
  if (_mm_movemask_ps(_mm_and_ps(maybe, _mm_cmpneq_ps(x, _mm_setzero_ps()))) != 0) x = to_odd_floats(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec v) {
  __m128 x = _mm256_cvtpd_ps(v);
  __m128i bits = _mm_castps_si128(x);
  if (_mm_movemask_epi8(_mm_cmpeq_epi32(_mm_and_si128(bits, _mm_set1_epi32(0xffff)),
                                        _mm_set1_epi32(kHalfwayBFloat16))) != 0) {
    x = to_odd_floats(v);
    bits = _mm_castps_si128(x);
  }
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x00400000));
  rounded =
      _mm_srli_epi32(_mm_blendv_epi8(rounded, quiet, _mm_castps_si128(_mm_cmp_ps(x, x, _CMP_UNORD_Q))), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(rounded, rounded));
}
inline void stream(double* p, Vec v) { _mm256_stream_pd(p, v); }
inline void stream(float* p, Vec v) { _mm_stream_ps(p, _mm256_cvtpd_ps(v)); }
inline void stream_fence() { _mm_sfence(); }

#else

// IEEE half to single: shift the fields into place and let a multiplication by 2^112 rebias the exponent; it
// is exact for subnormals too. Infinities and NaNs have to be widened by hand.
inline float half_to_float(std::uint16_t h) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(h & 0x7fffu) << 13;
  float x = bit_cast<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000u) x = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<std::uint32_t>(x) | (static_cast<std::uint32_t>(h & 0x8000u) << 16));
}

// Single to IEEE half, to nearest even.
inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a half is a multiple of 2^-24: adding 1/2 aligns that with the last bit of the sum.
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(aligned) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// To nearest even; a NaN stays one.
inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float to_odd_float(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  std::uint32_t bits = bit_cast<std::uint32_t>(nearest);
  if (__builtin_fabs(back) > __builtin_fabs(x)) bits -= 1;
  if (back < x || back > x) bits |= 1;
  return bit_cast<float>(bits);
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) { return half_to_float(x.bits); }

template <class T>
inline Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
inline VecF load_floats(const T* p) {
  VecF v;
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store(float* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<float>(v[i]);
}
inline void store(Float16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) {
    const float x = static_cast<float>(v[i]);
    const bool maybe = (bit_cast<std::uint32_t>(x) & kMaybeHalfwayFloat16) == 0 && x != 0;
    p[i].bits = float_to_half(maybe ? to_odd_float(v[i]) : x);
  }
}
inline void store(BFloat16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) {
    const float x = static_cast<float>(v[i]);
    const bool halfway = (bit_cast<std::uint32_t>(x) & 0xffffu) == kHalfwayBFloat16;
    p[i].bits = float_to_bfloat16(halfway ? to_odd_float(v[i]) : x);
  }
}
inline void stream(double* p, Vec v) { store(p, v); }
inline void stream(float* p, Vec v) { store(p, v); }
inline void stream_fence() {}

#endif

inline void stream(BFloat16* p, Vec v) { store(p, v); }
inline void stream(Float16* p, Vec v) { store(p, v); }

// The first n elements, fewer than there are lanes, and zeros in the others.
template <class T>
inline Vec load_part(const T* p, std::int64_t n) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(padded);
}
template <class T>
inline VecF load_floats_part(const T* p, std::int64_t n) {
  T padded[2 * kLanes] = {};
  __builtin_memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
  return load_floats(padded);
}
template <class T>
inline void store_part(T* p, Vec v, std::int64_t n) {
  T padded[kLanes];
  store(padded, v);
  __builtin_memcpy(p, padded, static_cast<std::size_t>(n) * sizeof(T));
}

}  // namespace mtl::cpu::MTL_ISA
