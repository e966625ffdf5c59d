#pragma once

// How functions of the shared headers are declared: for a host alone, or for a host and a GPU.

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MTL_HD __host__ __device__ inline
#else
#define MTL_HD inline
#endif

// The same for what is compiled once per instruction set: always inlined on a host, so that there is no copy
// of it that another set could end up with.
#if defined(__CUDACC__) || defined(__HIPCC__) || !defined(__GNUC__)
#define MTL_HD_LOCAL MTL_HD
#else
#define MTL_HD_LOCAL __attribute__((always_inline)) inline
#endif

// For loops that are not worth the registers of several rounds at once: every kernel with a solver behind it
// has as many as the solver needs.
#if defined(__CUDACC__)
#define MTL_NO_UNROLL _Pragma("unroll 1")
#else
#define MTL_NO_UNROLL
#endif
