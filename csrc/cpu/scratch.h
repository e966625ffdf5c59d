#pragma once

#include <cstddef>

namespace mtl::cpu {

// At least so many doubles of this thread's own, aligned to a cache line, kept between calls: training calls
// with the same K at every step.
double* thread_scratch(std::size_t doubles);

}  // namespace mtl::cpu
