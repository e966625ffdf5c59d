// Gram for more than eight rows, on the tensor cores.
//
// A block copies a few columns of every row to shared memory, asynchronously and some stages ahead; its warps
// multiply what has arrived. Lane (g, t) = (lane / 4, lane % 4) of a warp reads 16 bytes of row g of a group
// of eight rows, the t-th of four neighbouring ones. That is already the layout in which the tensor cores
// want a row as an operand, left or right, because the order of the columns does not matter to a sum over
// them.
//
// Float and double rows are multiplied in double: exact for float. 16-bit rows are multiplied in float,
// exactly, and summed there over a run of a tile (at most 128 columns a warp), then in double. Where the
// squares of a run do not fit a float the block takes the run again, in double.
//
// Rows are cut into kBands bands of 16. A warp multiplies its own band with itself and with the next bands,
// cyclically, so that all warps do alike; of two bands that lie half the circle apart each takes the product
// in every other step. Warps beyond kBands work on further columns.
#include <cfloat>

#include "absent.h"
#include "elements.h"
#include "finish.h"
#include "gram_kernels.h"

namespace mtl::cuda {
namespace {

// Shared memory of a multiprocessor at least, of which the system keeps a little for every block.
#if defined(__CUDA_ARCH__) && \
    ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900 && __CUDA_ARCH__ != 870) || __CUDA_ARCH__ >= 1200)
constexpr int kMultiprocessorBytes = 100 << 10;  // of GPUs for consumers
#else
constexpr int kMultiprocessorBytes = 164 << 10;
#endif
constexpr int kOtherBytes = 2 << 10;  // of a block: the system's, and what solvers and statistics use

template <class T, int kBands_>
struct Shape {
  static constexpr int kBands = kBands_;
  static constexpr int kRows = 16 * kBands;
  static constexpr int kStreams = kBands == 1   ? 8
                                  : kBands == 2 ? 4
                                  : kBands == 3 ? (kIsHalf<T> ? 2 : 4)
                                  : kBands == 4 ? 2
                                                : 1;  // of columns
  static constexpr int kWarps = kBands * kStreams;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kDistances = kBands / 2 + 1;  // between bands that are multiplied, 0 included
  static constexpr bool kHasFar = kBands % 2 == 0;   // whether the last of them is half the circle
  static constexpr int kGroups = 2 * kDistances;     // of eight rows that a warp reads
  static constexpr int kSteps = kBands >= 4 || (kIsHalf<T> && kBands >= 2) ? 2 : 1;  // of a warp, per stage

  static constexpr int kStageBytes = 64 * kStreams * kSteps;  // of a row
  static constexpr int kStageColumns = kStageBytes / static_cast<int>(sizeof(T));
  // Rows 64 bytes apart modulo 128: the eight lanes that read at the same time then meet every bank once.
  static constexpr int kPitch = kStageBytes % 128 == 0 ? kStageBytes + 64 : kStageBytes;
  static constexpr int kBufferBytes = (kRows - 1) * kPitch + kStageBytes;
  static constexpr int kStages = 4;
  static constexpr int kSharedBytes = kBufferBytes * kStages;
  static_assert(kSharedBytes <= 96 << 10,
                "with what else a block has, at most the 99 KB of a consumer's GPU");

  static constexpr int kChunksPerRow = kStageBytes / 16;
  static constexpr int kChunks = kRows * kChunksPerRow / kThreads;  // that a thread copies per stage
  static_assert(kRows * kChunksPerRow % kThreads == 0, "every thread copies as much");
  static_assert(num_pairs(kRows) * 8 <= kBufferBytes * kStages, "the triangle reuses the buffers");
  static_assert(kWarps <= BlockTeam::kMaxWarps, "the block is the team of the solver behind");

  // At a time on a multiprocessor. The copies in flight hide the memory's latency, not the number of warps;
  // what a second block hides is that a warp converts, multiplies and waits for a barrier in turn. There is
  // none where the registers do not allow it, or where it would find no shared memory.
  static constexpr bool kFewRegisters = kBands <= 2 || (kBands == 4 && !kIsHalf<T>);
  static constexpr int kMinBlocks =
      kFewRegisters && 2 * (kSharedBytes + kOtherBytes) <= kMultiprocessorBytes ? 2 : 1;

  static constexpr int kRunStages = 4 / kSteps;  // summed in float, of 16-bit rows
  static constexpr int kTileStages = kIsHalf<T> ? kRunStages : 8;
  static constexpr int kLongTileStages = 32;  // where every block has many tiles
};

// Copies the columns of a slice to shared memory, stage by stage. A thread copies the same 16 bytes of a
// stage, in rows kRowStep apart.
template <class S, class T>
class Copier {
 public:
  __device__ Copier(const GramArgs& args, const Slice& slice, int tile)
      : args_(args),
        tile_(tile),
        stride_(static_cast<int>(slice.stride)),
        end_tile_(static_cast<int>(slice.end_tile)) {
    go_to(tile);
  }
  __device__ bool done() const { return tile_ >= end_tile_; }
  __device__ int tile() const { return tile_; }
  __device__ int left() const { return left_; }
  __device__ int stride() const { return stride_; }
  __device__ int end_tile() const { return end_tile_; }

  // Goes to the first stage of `tile`.
  __device__ void go_to(int tile) {
    tile_ = tile;
    if (done()) return;
    next_ = args_.tiles[tile];
    enter_tile();
  }
  // Leaves out so many bytes of the tile.
  __device__ void skip(int bytes) {
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i)
      if (from_[i] != nullptr) from_[i] += bytes;
    left_ -= bytes;
  }
  // Whether the next stage is the last of its tile.
  __device__ bool ends_tile() const { return left_ <= S::kStageBytes - place(); }

  // Starts the copies of the next stage.
  __device__ __forceinline__ void copy(unsigned char* buffer) {
    unsigned char* to = buffer + first_row() * S::kPitch + place();
    const int valid = left_ < 0 ? 0 : left_ > 16 ? 16 : left_;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const bool there = from_[i] != nullptr && valid > 0;
      // An address is named even where nothing is read from it.
      const auto* from = there ? from_[i] : reinterpret_cast<const unsigned char*>(args_.pointers);
      copy_chunk(to + i * kRowStep * S::kPitch, from, there ? valid : 0);
      if (from_[i] != nullptr) from_[i] += S::kStageBytes;
    }
    const bool ends = ends_tile();
    left_ -= S::kStageBytes;
    if (!ends) return;
    tile_ += stride_;
    if (!done()) enter_tile();
  }

 private:
  static constexpr int kRowStep = S::kThreads / S::kChunksPerRow;

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / S::kChunksPerRow; }
  __device__ static int place() { return static_cast<int>(threadIdx.x) % S::kChunksPerRow * 16; }

  // The tile after this one is read here, ahead of the time: what follows has to wait for addresses only.
  __device__ void enter_tile() {
    const Tile tile = next_;
    if (tile_ + stride_ < end_tile_) next_ = args_.tiles[tile_ + stride_];
    std::uintptr_t any = 0;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const std::uintptr_t row = row_address(args_.pointers, args_.num_params, args_.num_tasks,
                                             first_row() + i * kRowStep, tile.param);
      any |= row;
      from_[i] = row == 0 ? nullptr
                          : reinterpret_cast<const unsigned char*>(element_at<T>(row, tile.begin)) + place();
    }
    alignment_ = any % 16 == 0 ? 16 : any % 4 == 0 ? 4 : 2;
    left_ = tile.columns * static_cast<int>(sizeof(T)) - place();
  }

  // 16 bytes, of which the first `valid` are there and the others zero, in pieces as wide as the address
  // allows.
  __device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int valid) const {
    if (alignment_ == 16) {
      copy_async<16>(to, from, valid);
    } else if (alignment_ == 4) {
#pragma unroll 1
      for (int n = 0; n < 16; n += 4) {
        const int bytes = valid - n < 0 ? 0 : valid - n > 4 ? 4 : valid - n;
        copy_async<4>(to + n, bytes > 0 ? from + n : from, bytes);
      }
    } else {
      *reinterpret_cast<Vector<T>*>(to) = gather_elements<T>(reinterpret_cast<std::uintptr_t>(from), 0, 1,
                                                             valid / static_cast<int>(sizeof(T)));
    }
  }

  const GramArgs& args_;
  int tile_, stride_, end_tile_;
  Tile next_;
  const unsigned char* from_[S::kChunks];
  int left_ = 0;  // bytes of the tile from this thread's place on
  int alignment_ = 16;
};

// What a warp does: its band, its stream of columns, and where its groups of eight rows lie in a buffer.
template <class S>
struct Share {
  int band, stream, g, t;

  __device__ Share()
      : band(static_cast<int>(threadIdx.x) / kWarp % S::kBands),
        stream(static_cast<int>(threadIdx.x) / kWarp / S::kBands),
        g(static_cast<int>(threadIdx.x) % kWarp / 4),
        t(static_cast<int>(threadIdx.x) % 4) {}
  __device__ int band_of(int group) const {
    const int other = band + group / 2;
    return other < S::kBands ? other : other - S::kBands;
  }
  __device__ int first_row(int group) const { return 16 * band_of(group) + 8 * (group % 2); }
  // Whether it is this warp's turn to multiply with the band half the circle away.
  __device__ bool takes_far(int step) const { return (step % 2 == 0) == (band < S::kBands / 2); }
};

__device__ __forceinline__ void mma_half(BFloat16, float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
  mma_bfloat16(c, a0, a1, a2, a3, b0, b1);
}
__device__ __forceinline__ void mma_half(Float16, float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
  mma_float16(c, a0, a1, a2, a3, b0, b1);
}

// Elements that are multiplied in double at once: of 16-bit rows the first half of 16 bytes.
template <class T>
constexpr int kDoubles = Vector<T>::kElements < 4 ? Vector<T>::kElements : 4;

template <class T>
__device__ __forceinline__ void multiply(const Vector<T> (&own)[2], const Vector<T>& other, double (&c)[4]) {
  double a0[kDoubles<T>], a1[kDoubles<T>], b[kDoubles<T>];
#pragma unroll
  for (int i = 0; i < kDoubles<T>; ++i) {
    a0[i] = own[0].exact(i);
    a1[i] = own[1].exact(i);
    b[i] = other.exact(i);
  }
  mma_double(c, a0, a1, b);
}

template <class T>
__device__ __forceinline__ void multiply(const Vector<T> (&own)[2], const Vector<T>& other, float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    mma_half(T{}, c, own[0].words[i], own[1].words[i], own[0].words[i + 1], own[1].words[i + 1],
             other.words[i], other.words[i + 1]);
  }
}

// A band with itself: its second group of columns needs no product with the rows of the first, which are
// above the diagonal there.
template <class T>
__device__ __forceinline__ void multiply_own(const Vector<T> (&own)[2], double (&first)[4],
                                             double (&second)[4]) {
  multiply<T>(own, own[0], first);
#pragma unroll
  for (int i = 0; i < kDoubles<T>; ++i)
    mma_double_eight(second[2], second[3], own[1].exact(i), own[1].exact(i));
}

template <class T>
__device__ __forceinline__ void multiply_own(const Vector<T> (&own)[2], float (&first)[4],
                                             float (&second)[4]) {
  multiply<T>(own, own[0], first);
  multiply<T>(own, own[1], second);
}

// 16 bytes of a row, or part 1 of two moved to where part 0 is.
template <int kParts, class T>
__device__ __forceinline__ Vector<T> load_part(const unsigned char* from, int part) {
  Vector<T> loaded = load_words<T>(from);
  if (kParts == 2 && part == 1) {
    loaded.words[0] = loaded.words[2];
    loaded.words[1] = loaded.words[3];
  }
  return loaded;
}

// Adds the products of one stage. `bits` collects the words of the warp's own band, see in_float_range. Where
// 16-bit rows are taken in double, 16 bytes are taken in two parts: as doubles they would be too many
// registers.
template <class S, class T, class Sum>
__device__ __forceinline__ void multiply_stage(const Share<S>& share, int stage, const unsigned char* buffer,
                                               Sum (&sums)[S::kGroups][4], unsigned (&bits)[2]) {
  constexpr int kParts =
      Vector<T>::kElements / (std::is_same_v<Sum, double> ? kDoubles<T> : Vector<T>::kElements);
#pragma unroll 1
  for (int n = 0; n < S::kSteps * kParts; ++n) {
    const int step = n / kParts, part = n % kParts;
    const unsigned char* place =
        buffer + share.g * S::kPitch + (step * S::kStreams + share.stream) * 64 + share.t * 16;
    Vector<T> own[2];
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      const bool far = S::kHasFar && group >= S::kGroups - 2;
      if (far && !share.takes_far(stage * S::kSteps + step)) continue;
      const unsigned char* from = place + share.first_row(group) * S::kPitch;
      if (group < 2) {
        own[group] = load_part<kParts, T>(from, part);
        bits[group] |= own[group].words[0] | own[group].words[1] | own[group].words[2] | own[group].words[3];
        if (group == 1) multiply_own<T>(own, sums[0], sums[1]);
      } else {
        const Vector<T> other = load_part<kParts, T>(from, part);
        multiply<T>(own, other, sums[group]);
      }
    }
  }
}

// Whether no thread of the block has reason to distrust the sums of a run in float: none overflowed, and no
// row is so small that its squares underflowed.
template <class S, class T>
__device__ __forceinline__ bool trusted(const float (&sums)[S::kGroups][4], const unsigned (&bits)[2]) {
  bool good = true;
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group)
#pragma unroll
    for (int i = 0; i < 4; ++i) good = good && fabsf(sums[group][i]) <= FLT_MAX;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    unsigned row = bits[group];
    row |= __shfl_xor_sync(kAllLanes, row, 1);
    row |= __shfl_xor_sync(kAllLanes, row, 2);
    good = good && in_float_range<T>(row);
  }
  return __syncthreads_or(!good) == 0;
}

// Adds the products of the stages [first, last) of a tile in double, without reading ahead, through a buffer
// that no copy is on its way to. Leaves the copier where it was.
template <class S, class T>
__device__ __forceinline__ void take_again(Copier<S, T>& copier, int tile, int first, int last,
                                           const Share<S>& share, unsigned char* buffer,
                                           double (&sums)[S::kGroups][4]) {
  const int tile_before = copier.tile(), left_before = copier.left();
  unsigned unused[2] = {};
  copier.go_to(tile);
  copier.skip(first * S::kStageBytes);
#pragma unroll 1
  for (int stage = first; stage < last; ++stage) {
    __syncthreads();
    copier.copy(buffer);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    multiply_stage<S, T>(share, stage, buffer, sums, unused);
  }
  copier.go_to(tile_before);
  if (!copier.done()) copier.skip(copier.left() - left_before);
}

// All columns of a slice.
template <class S, class T>
__device__ __forceinline__ void sum_slice(const GramArgs& args, const Slice& slice, const Share<S>& share,
                                          unsigned char* buffers, double (&sums)[S::kGroups][4]) {
  Copier<S, T> copier(args, slice, static_cast<int>(slice.first_tile));
  unsigned ends = 0;  // bit n: the stage in buffer n is the last of its tile
  const auto fill = [&](int buffer) {
    if (!copier.done()) {
      ends = copier.ends_tile() ? ends | 1u << buffer : ends & ~(1u << buffer);
      copier.copy(buffers + buffer * S::kBufferBytes);
    }
    copy_commit();
  };
  for (int buffer = 0; buffer + 1 < S::kStages; ++buffer) fill(buffer);
  unsigned bits[2] = {};
  [[maybe_unused]] float run_sums[S::kGroups][4] = {};
  int buffer = 0;
  int tile = static_cast<int>(slice.first_tile);
  [[maybe_unused]] int run_begin = 0, run_end = 0;  // stages of the tile
  [[maybe_unused]] const bool in_float = slice.columns >= kFloatColumns;
  for (int stage = 0; tile < copier.end_tile(); ++stage) {
    copy_wait<S::kStages - 2>();
    __syncthreads();
    const bool tile_ends = (ends >> buffer & 1u) != 0;
    // The buffer that all warps have left behind.
    fill(buffer == 0 ? S::kStages - 1 : buffer - 1);
    unsigned char* arrived = buffers + buffer * S::kBufferBytes;
    if constexpr (kIsHalf<T>) {
      multiply_stage<S, T>(share, stage, arrived, run_sums, bits);
    } else {
      multiply_stage<S, T>(share, stage, arrived, sums, bits);
    }
    buffer = buffer + 1 == S::kStages ? 0 : buffer + 1;
    if constexpr (kIsHalf<T>) {
      ++run_end;
      if (!tile_ends && run_end - run_begin < S::kRunStages) continue;
      if (in_float && trusted<S, T>(run_sums, bits)) {
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[group][i] += static_cast<double>(run_sums[group][i]);
      } else {
        take_again<S, T>(copier, tile, run_begin, run_end, share, arrived, sums);
      }
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 4; ++i) run_sums[group][i] = 0.0f;
      bits[0] = bits[1] = 0;
      run_begin = run_end = tile_ends ? 0 : run_end;
    }
    if (tile_ends) tile += copier.stride();
  }
}

// Adds a warp's sums to the triangle.
template <class S>
__device__ __forceinline__ void add_to_triangle(const Share<S>& share, const double (&sums)[S::kGroups][4],
                                                double* triangle) {
  const int g = opaque(share.g);
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = 16 * share.band + g + 8 * (c / 2);
      const int j = share.first_row(group) + 2 * opaque(share.t) + c % 2;
      if (group < 2 && j > i) continue;
      triangle[i > j ? num_pairs(i) + j : num_pairs(j) + i] += sums[group][c];
    }
  }
}

template <class T, int kBands>
__global__ void __launch_bounds__(Shape<T, kBands>::kThreads, Shape<T, kBands>::kMinBlocks)
    gram_tensor(const __grid_constant__ GramArgs args) {
  using S = Shape<T, kBands>;
  unsigned char* buffers = dynamic_shared();
  const Share<S> share;
  const int pairs = num_pairs(args.num_tasks);
  const int end_slice = static_cast<int>(args.first_slice + args.num_slices);
  for (int slice_number = static_cast<int>(args.first_slice + blockIdx.x); slice_number < end_slice;
       slice_number += static_cast<int>(gridDim.x)) {
    const Slice slice = args.slices[slice_number];
    double sums[S::kGroups][4] = {};
    sum_slice<S, T>(args, slice, share, buffers, sums);
    __syncthreads();
    auto* triangle = reinterpret_cast<double*>(buffers);
    for (int pair = static_cast<int>(threadIdx.x); pair < num_pairs(S::kRows); pair += S::kThreads)
      triangle[pair] = 0.0;
    // Streams add up the same pairs, and so do the two halves of the circle: one after the other.
    for (int turn = 0; turn < 2 * S::kStreams; ++turn) {
      __syncthreads();
      if (turn == 2 * share.stream + (2 * share.band >= S::kBands ? 1 : 0))
        add_to_triangle<S>(share, sums, triangle);
    }
    __syncthreads();
    double* out = args.meeting.slice_sums + static_cast<std::int64_t>(slice_number) * pairs;
    bool finite = true;
    for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += S::kThreads) {
      out[pair] = triangle[pair];
      finite = finite && fabs(triangle[pair]) <= DBL_MAX;
    }
    mend_absent_rows<T>(args, slice_number, finite, out);
    finish<S::kRows>(args, slice_number);
  }
}

template <class T, int kBands>
GramKernel kernel() {
  using S = Shape<T, kBands>;
  return {gram_tensor<T, kBands>, S::kThreads,    S::kSharedBytes,
          S::kStageColumns,       S::kTileStages, S::kLongTileStages};
}

// Few kernels for double, whose gradients are rare.
template <class T>
GramKernel kernel_for(int num_tasks) {
  if constexpr (!std::is_same_v<T, double>) {
    if (num_tasks <= 16) return kernel<T, 1>();
    if (num_tasks > 32 && num_tasks <= 48) return kernel<T, 3>();
  }
  if (num_tasks <= 32) return kernel<T, 2>();
  if (num_tasks <= 64) return kernel<T, 4>();
  return kernel<T, 8>();
}

}  // namespace

GramKernel tensor_kernel(DType dtype, int num_tasks) {
  return with_element(dtype, [&](auto element) { return kernel_for<decltype(element)>(num_tasks); });
}

}  // namespace mtl::cuda
