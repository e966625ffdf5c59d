#include "gram.h"

#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "mtl_kernels/chunks.h"
#include "parallel.h"
#include "scratch.h"

namespace mtl::cpu {
namespace {

constexpr std::int64_t kAlignment = 1024, kMinColumns = 2048, kMaxChunks = 64;

// A group of fewer columns than this is summed in double throughout: there is little to gain, and too few
// sums in float for their rounding errors to cancel. Few rows are bound by memory, so their kernels use
// double at any length.
constexpr std::int64_t kFloatColumns = 1 << 15;

// Sums in float are trusted while the mean square of every row is within these: below, products underflow;
// above, they overflow.
constexpr double kSmallestMeanSquare = 1e-28, kLargestMeanSquare = 1e32;

bool all_zero_bits(std::uintptr_t address, std::int64_t bytes) {
  const char* p = reinterpret_cast<const char*>(address);
  std::int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    std::uint64_t words[8];
    std::memcpy(words, p + i, sizeof(words));
    std::uint64_t any = 0;
    for (std::uint64_t word : words) any |= word;
    if (any != 0) return false;
  }
  for (; i < bytes; ++i)
    if (p[i] != 0) return false;
  return true;
}

class Gram {
 public:
  Gram(const RowTable& rows, int num_groups, int threads)
      : rows_(rows),
        num_groups_(num_groups),
        threads_(threads),
        pairs_(static_cast<std::size_t>(rows.num_tasks) * (rows.num_tasks + 1) / 2),
        plan_(plan_chunks(rows, kAlignment, kMinColumns, kMaxChunks)),
        partials_(plan_.chunks.size() * pairs_),
        totals_(num_groups * pairs_),
        columns_(num_groups) {
    for (std::int64_t p = 0; p < rows.num_params; ++p) columns_[rows.groups[p]] += rows.numels[p];
  }

  void run(double* out) {
    sum(kFloatColumns);
    if (!trusted()) sum(std::numeric_limits<std::int64_t>::max());
    write(out);
  }

 private:
  // Groups of at least so many columns are summed in float.
  void sum(std::int64_t float_columns) {
    const Kernels& isa = kernels();
    const std::size_t scratch = isa.gram_scratch(rows_.num_tasks);
    parallel_for(static_cast<std::int64_t>(plan_.chunks.size()), threads_, [&](std::int64_t i) {
      const Chunk& chunk = plan_.chunks[i];
      isa.gram_chunk(rows_, plan_.segments.data() + chunk.first_segment, chunk.num_segments,
                     columns_[chunk.group] >= float_columns, thread_scratch(scratch),
                     partials_.data() + i * pairs_);
    });
    // In the order of the chunks, whichever thread worked on them.
    totals_.assign(totals_.size(), 0);
    for (std::size_t i = 0; i < plan_.chunks.size(); ++i) {
      double* total = totals_.data() + plan_.chunks[i].group * pairs_;
      for (std::size_t pair = 0; pair < pairs_; ++pair) total[pair] += partials_[i * pairs_ + pair];
    }
  }

  bool trusted() const {
    for (int group = 0; group < num_groups_; ++group) {
      if (columns_[group] < kFloatColumns) continue;
      const double* total = totals_.data() + group * pairs_;
      for (int k = 0; k < rows_.num_tasks; ++k) {
        const double mean_square = total[k * (k + 3) / 2] / static_cast<double>(columns_[group]);
        if (mean_square >= kSmallestMeanSquare && mean_square <= kLargestMeanSquare) continue;
        if (mean_square != 0 || !is_zero(k, group)) return false;
      }
    }
    return true;
  }

  // Whether row k is absent or zero throughout the group, rather than so small that its squares underflowed.
  bool is_zero(int k, int group) const {
    for (std::int64_t p = 0; p < rows_.num_params; ++p) {
      const std::uintptr_t row = rows_.pointers[k * rows_.num_params + p];
      if (rows_.groups[p] == group && row != 0 &&
          !all_zero_bits(row, rows_.numels[p] * item_size(rows_.dtypes[p])))
        return false;
    }
    return true;
  }

  void write(double* out) const {
    const int K = rows_.num_tasks;
    for (int group = 0; group < num_groups_; ++group) {
      const double* total = totals_.data() + group * pairs_;
      double* g = out + static_cast<std::int64_t>(group) * K * K;
      for (int i = 0; i < K; ++i)
        for (int j = 0; j <= i; ++j) g[i * K + j] = g[j * K + i] = *total++;
    }
  }

  const RowTable& rows_;
  const int num_groups_, threads_;
  const std::size_t pairs_;
  const ChunkPlan plan_;
  std::vector<double> partials_;
  std::vector<double> totals_;
  std::vector<std::int64_t> columns_;
};

}  // namespace

void gram(const RowTable& rows, int num_groups, double* out, int threads) {
  Gram(rows, num_groups, threads).run(out);
}

}  // namespace mtl::cpu
