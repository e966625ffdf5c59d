#pragma once

#include "gram_args.h"

namespace mtl::cuda {

// A place in a list of spans, found anew for tiles that come in rising or in falling order. -1: nowhere yet.
class Walk {
 public:
  __device__ Walk(const Span* spans, int num_spans, int at) : spans_(spans), num_spans_(num_spans), at_(at) {}

  // Goes to the span that holds the tile; true if that is another one than before.
  __device__ bool seek(std::int64_t tile) {
    const int before = at_;
    if (at_ < 0) at_ = 0;
    while (at_ + 1 < num_spans_ && tile >= spans_[at_ + 1].first_tile) ++at_;
    while (at_ > 0 && tile < spans_[at_].first_tile) --at_;
    return at_ != before;
  }
  __device__ const Span& span() const { return spans_[at_]; }

 private:
  const Span* spans_;
  int num_spans_, at_;
};

// The address of row k at a parameter, 0 for a task that does not reach it or does not exist.
__device__ inline std::uintptr_t row_pointer(const std::uintptr_t* pointers, std::int64_t num_params,
                                             int num_tasks, int k, std::int64_t param) {
  return k < num_tasks ? pointers[k * num_params + param] : 0;
}

}  // namespace mtl::cuda
