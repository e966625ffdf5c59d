#include "kernels.h"

namespace mtl::cpu::MTL_ISA {

std::size_t gram_scratch(int num_tasks);
void gram_chunk(const RowTable& rows, const Segment* segments, std::int64_t num_segments, bool in_float,
                double* scratch, double* partial);
void combine_segment(const RowTable& rows, const Segment& segment, const double* weights,
                     const Target& target);

#define MTL_STRING_(x) #x
#define MTL_STRING(x) MTL_STRING_(x)
extern const Kernels kernels = {MTL_STRING(MTL_ISA), gram_scratch, gram_chunk, combine_segment};

}  // namespace mtl::cpu::MTL_ISA
