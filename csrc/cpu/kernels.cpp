#include "kernels.h"

namespace mtl::cpu::MTL_ISA {

std::size_t gram_scratch(int num_tasks);
void gram_chunk(const RowTable& rows, const Segment* segments, std::int64_t num_segments, bool in_float,
                double* scratch, double* partial);
void combine_segment(const RowTable& rows, const Segment& segment, const double* weights,
                     const Target& target);
std::size_t reduce_scratch(int num_tasks);
void reduce_segment(const RowTable& rows, const Segment& segment, const ColumnCall& call, std::int64_t first,
                    std::uintptr_t out, double* scratch);
double update_segment(const Elements& row, const Elements& state, std::int64_t begin, std::int64_t length,
                      const StateCall& call, std::int64_t place);

#define MTL_STRING_(x) #x
#define MTL_STRING(x) MTL_STRING_(x)
extern const Kernels kernels = {MTL_STRING(MTL_ISA), gram_scratch,   gram_chunk,    combine_segment,
                                reduce_scratch,      reduce_segment, update_segment};

}  // namespace mtl::cpu::MTL_ISA
