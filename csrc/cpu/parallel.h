// A parallel loop over independent indices, on a pool of its own.
//
// The pool is separate from the OpenMP runtime that torch brings along: linking a second OpenMP would give
// the process two pools that spin against each other, and would tie the wheel to a runtime library.
#pragma once

#include <cstdint>

namespace mtl::cpu {

namespace detail {
using Body = void (*)(void* context, std::int64_t index);
void run(std::int64_t n, int threads, Body body, void* context);
}  // namespace detail

// Calls f(i) once for every i in [0, n), on at most `threads` threads, the calling one included. Indices are
// handed out in ascending order. Runs serially when the pool is busy with another caller. When an f throws,
// no further index is handed out, and the first exception leaves here once every thread is done.
template <class F>
void parallel_for(std::int64_t n, int threads, const F& f) {
  if (threads <= 1 || n <= 1) {
    for (std::int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  detail::run(
      n, threads, [](void* context, std::int64_t index) { (*static_cast<const F*>(context))(index); },
      const_cast<F*>(&f));
}

}  // namespace mtl::cpu
