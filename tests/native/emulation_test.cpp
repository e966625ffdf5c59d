// The emulation itself: that correct kernels run in every order, and that each kind of wrong one is caught.
// `emulation_test` runs the correct ones, `emulation_test <case>` a wrong one, which should not survive it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "cuda_emulation.h"
#include "ptx_twins.h"

namespace {

using emulation::Order;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

template <class T>
__device__ T warp_sum(T x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class T, int kThreads>
__device__ T block_sum(T x) {
  __shared__ T partial[kThreads / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : T(0);
  if (threadIdx.x < 32) x = warp_sum(x);
  __syncthreads();
  return x;
}

// The last block to arrive adds up what the others left.
template <int kThreads, bool kReleases, bool kAcquires>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* x, int n, double* partial, unsigned* arrived, double* out) {
  __shared__ bool is_last;
  double total = 0;
  for (int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * kThreads))
    total += x[i];
  total = block_sum<double, kThreads>(total);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
    if (kReleases) __threadfence();
    is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (kAcquires) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  total = threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0;
  total = block_sum<double, kThreads>(total);
  if (threadIdx.x == 0) {
    *out = total;
    *arrived = 0;
  }
}

template <bool kReleases = true, bool kAcquires = true>
void last_block() {
  std::vector<double> x(1000);
  std::iota(x.begin(), x.end(), 1.0);
  std::vector<double> partial(5, NAN);
  unsigned arrived = 0;
  for (int round = 0; round < 3; ++round) {
    double out = 0;
    expect(emulated_launch(sum_kernel<128, kReleases, kAcquires>, 5, 128, 0, nullptr, x.data(), 1000,
                           partial.data(), &arrived, &out) == cudaSuccess,
           "the launch");
    expect(out == 500500, "the sum over blocks");
  }
}

// The same with every thread as the author of a partial result and of both fences.
__global__ void all_fence_kernel(int* partial, unsigned* arrived, int* out) {
  __shared__ unsigned before;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(threadIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrived, 1u);
  __syncthreads();
  if (before + 1 != gridDim.x) return;
  if (threadIdx.x == 0) *arrived = 0;
  __threadfence();
  out[threadIdx.x] = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) out[threadIdx.x] += partial[b * blockDim.x + (threadIdx.x ^ 1)];
}

void all_fence() {
  for (unsigned blocks = 1; blocks < 4; ++blocks) {
    std::vector<int> partial(64 * blocks), out(64);
    unsigned arrived = 0;
    emulated_launch(all_fence_kernel, blocks, 64, 0, nullptr, partial.data(), &arrived, out.data());
    for (int i = 0; i < 64; ++i) expect(out[i] == static_cast<int>(blocks) * (i ^ 1), "sums of all threads");
  }
}

// Reverses the values of a block through dynamic shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const int* in, int* out) {
  int* stage = reinterpret_cast<int*>(emulation::dynamic_shared());
  stage[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = stage[blockDim.x - 1 - threadIdx.x];
}

template <bool kBarrier = true>
void reverse() {
  std::vector<int> in(96), out(96);
  std::iota(in.begin(), in.end(), 0);
  emulated_launch(reverse_kernel<kBarrier>, 1, 96, 96 * sizeof(int), nullptr, in.data(), out.data());
  for (int i = 0; i < 96; ++i) expect(out[i] == 95 - i, "reversed values");
}

// Reads what another lane wrote, across a shuffle that orders nothing.
template <bool kBarrier>
__global__ void neighbour_kernel(int* out) {
  __shared__ int stage[64];
  stage[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncwarp();
  __shfl_sync(0xffffffffu, 1, 0);
  out[blockIdx.x * 64 + threadIdx.x] = stage[threadIdx.x ^ 1];
  __syncwarp();
  stage[threadIdx.x ^ 1] = 0;
}

template <bool kBarrier = true>
void neighbour() {
  std::vector<int> out(128);
  emulated_launch(neighbour_kernel<kBarrier>, 2, 64, 0, nullptr, out.data());
  for (int i = 0; i < 128; ++i) expect(out[i] == (i % 64 ^ 1), "the value of the neighbour");
}

struct Fragment {
  float a[4];
  int lane;
};

__global__ void collectives_kernel(int* failures) {
  const int lane = static_cast<int>(threadIdx.x) % 32, rank = static_cast<int>(threadIdx.x);
  const auto check = [&](bool holds) {
    if (!holds) atomicAdd(failures, 1);
  };
  check(__shfl_sync(~0u, rank, 5) == rank / 32 * 32 + 5);
  check(__shfl_sync(~0u, rank, 11, 8) == rank / 8 * 8 + 3);
  check(__shfl_xor_sync(~0u, 1.5 * rank, 9) == 1.5 * (rank ^ 9));
  check(__shfl_xor_sync(~0u, rank, 16, 16) == (lane < 16 ? rank : rank ^ 16));
  check(__shfl_down_sync(~0u, static_cast<float>(rank), 3) ==
        static_cast<float>(lane < 29 ? rank + 3 : rank));
  check(__shfl_down_sync(~0u, rank, 3, 4) == (lane % 4 < 1 ? rank + 3 : rank));
  check(__shfl_up_sync(~0u, static_cast<unsigned long long>(rank), 2) ==
        static_cast<unsigned long long>(lane >= 2 ? rank - 2 : rank));
  check(__ballot_sync(~0u, lane % 3 == 0) == 0x49249249u);
  check(__any_sync(~0u, lane == 17) != 0 && __any_sync(~0u, 0) == 0);
  check(__all_sync(~0u, 4) != 0 && __all_sync(~0u, lane != 17) == 0);
  check(__syncthreads_or(rank == 40) != 0 && __syncthreads_or(0) == 0);
  check(__syncthreads_and(8) != 0 && __syncthreads_and(rank != 40) == 0);
  check(__syncthreads_count(rank % 2) == static_cast<int>(blockDim.x) / 2);
  for (int round = 0; round < 3; ++round) {
    Fragment mine{{1, 2, 3, static_cast<float>(round)}, rank};
    const Fragment* all = emulation::warp_exchange(mine);
    for (int i = 0; i < 32; ++i)
      check(all[i].lane == rank / 32 * 32 + i && all[i].a[3] == static_cast<float>(round));
  }
}

// A 16 x k and a k x 8 matrix as the PTX ISA deals them to the lanes of a warp for mma.m16n8k(4 n) in .f64:
// element i of A in row g or g + 8 and column 2 i + t or 2 i - 2 + t, as i is even or odd, element i of B in
// row 4 i + t and column g; element i of C in row g, or g + 8 from i = 2 on, and column 2 t + i % 2.
template <int n>
__global__ void multiply_kernel(const double* A, const double* B, double* C) {
  constexpr int k = 4 * n;
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  double a[2][n], b[n], c[4];
  for (int i = 0; i < 2 * n; ++i)
    a[i % 2][i / 2] = i % 2 == 0 ? A[g * k + 2 * i + t] : A[(g + 8) * k + 2 * i - 2 + t];
  for (int i = 0; i < n; ++i) b[i] = B[(4 * i + t) * 8 + g];
  const auto of_c = [&](int i) { return (i < 2 ? g : g + 8) * 8 + 2 * t + i % 2; };
  for (int i = 0; i < 4; ++i) c[i] = C[of_c(i)];
  if constexpr (n == 1) {
    mtl::cuda::mma_double_eight(c[0], c[1], a[0][0], b[0]);
    mtl::cuda::mma_double_eight(c[2], c[3], a[1][0], b[0]);
  } else {
    mtl::cuda::mma_double(c, a[0], a[1], b);
  }
  for (int i = 0; i < 4; ++i) C[of_c(i)] = c[i];
}

template <int n>
void multiply() {
  constexpr int k = 4 * n;
  std::vector<double> A(16 * k), B(k * 8), C(16 * 8), expected;
  for (std::size_t i = 0; i < A.size(); ++i) A[i] = static_cast<double>(i * i % 31);
  for (std::size_t i = 0; i < B.size(); ++i) B[i] = static_cast<double>(i * i % 29);
  std::iota(C.begin(), C.end(), 0.0);
  expected = C;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      for (int p = 0; p < k; ++p) expected[i * 8 + j] += A[i * k + p] * B[p * 8 + j];
  emulated_launch(multiply_kernel<n>, 1, 32, 0, nullptr, A.data(), B.data(), C.data());
  expect(C == expected, "the product of two matrices");
}

__global__ void arrive_kernel(unsigned* counter, unsigned* before) {
  before[blockIdx.x * blockDim.x + threadIdx.x] = mtl::cuda::arrive(counter);
}

void arrivals() {
  unsigned counter = 0;
  std::vector<unsigned> before(64);
  emulated_launch(arrive_kernel, 2, 32, 0, nullptr, &counter, before.data());
  std::sort(before.begin(), before.end());
  for (unsigned i = 0; i < 64; ++i) expect(before[i] == i && counter == 64, "every arrival counts once");
}

// The bits of all float formats, and ints, in shared memory that nothing has written.
__global__ void unwritten_kernel(int* failures) {
  __shared__ float fixed[37];
  __shared__ __align__(16) unsigned short halves[3];
  alignas(16) __shared__ float4 aligned[2];
  const auto* dynamic = reinterpret_cast<const double*>(emulation::dynamic_shared());
  int written = halves[2] != 0xffff || !std::isnan(aligned[1].w) || !std::isnan(dynamic[6]);
  for (float x : fixed) written += !std::isnan(x);
  atomicAdd(failures, written);
  fixed[36] = 1;
  halves[2] = 0;
  aligned[1] = make_float4(1, 2, 3, 4);
}

__global__ void geometry_kernel(int* visits) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  visits[block * 24 + thread] += 1;
}

__global__ void order_kernel(int* turn, int* turns) {
  turns[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(turn, 1);
}

void orders() {
  int turn = 0;
  std::vector<int> turns(4 * 64);
  emulated_launch(order_kernel, 4, 64, 0, nullptr, &turn, turns.data());
  const auto& set = emulation::options();
  for (int i = 0; i < 4 * 64; ++i) {
    const int block = turns[i] / 64, thread = turns[i] % 64;
    if (set.blocks != Order::kRandom)
      expect(block == (set.blocks == Order::kAscending ? i / 64 : 3 - i / 64), "the order of the blocks");
    if (set.threads != Order::kRandom)
      expect(thread == (set.threads == Order::kAscending ? i % 64 : 63 - i % 64), "the order of the threads");
  }
  std::sort(turns.begin(), turns.end());
  for (int i = 0; i < 4 * 64; ++i) expect(turns[i] == i, "every thread once");
}

// Two stages in flight.
template <int kLeft>
__global__ void pipeline_kernel(const float4* in, float4* out, int n) {
  auto* stage = reinterpret_cast<float4*>(emulation::dynamic_shared()) + 2 * threadIdx.x;
  const auto fetch = [&](int i) {
    emulation::copy_async(stage + i % 2, in + i, 16, i < n ? 16 : 0);
    emulation::copy_commit();
  };
  fetch(0);
  for (int i = 0; i < n; ++i) {
    fetch(i + 1 < n ? i + 1 : i % 2 + 1);
    emulation::copy_wait(kLeft);
    out[i] = stage[i % 2];
  }
  emulation::copy_wait_all();
}

template <int kLeft = 1>
void pipeline() {
  std::vector<float4> in(9), out(8);
  for (int i = 0; i < 9; ++i) in[i] = make_float4(1, 2, 3, static_cast<float>(i));
  emulated_launch(pipeline_kernel<kLeft>, 1, 1, 32, nullptr, in.data(), out.data(), 8);
  for (int i = 0; i < 8; ++i) expect(out[i].w == static_cast<float>(i), "values copied asynchronously");
}

__global__ void one_barrier_kernel(int) { __syncthreads(); }

void runtime() {
  expect(emulated_launch(one_barrier_kernel, 1, 1025, 0, nullptr, 1) == cudaErrorInvalidConfiguration,
         "no block of more than 1024 threads");
  expect(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess,
         "an error is told once");
  const auto launch = [](std::size_t bytes) {
    return emulated_launch(one_barrier_kernel, 1, 1024, bytes, nullptr, 1);
  };
  expect(launch(48 << 10) == cudaSuccess, "48 KB of shared memory");
  expect(launch((48 << 10) + 1) == cudaErrorInvalidValue, "no more without asking");
  const auto raise = [](int bytes) {
    return cudaFuncSetAttribute(one_barrier_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  expect(raise(228 << 10) != cudaSuccess && raise(227 << 10) == cudaSuccess, "the limit of the device");
  expect(launch(227 << 10) == cudaSuccess, "227 KB of shared memory");
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, unwritten_kernel);
  expect(attributes.sharedSizeBytes == 37 * 4 + 6 + 32, "static shared memory");
  int value = 0;
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 3,
         "attributes of the device");
  emulation::options().launch_error = cudaErrorNoKernelImageForDevice;
  expect(launch(0) == cudaErrorNoKernelImageForDevice, "a launch that is made to fail");
  emulation::options().launch_error = cudaSuccess;
  cudaGetLastError();
  expect(__double2float_rz(1 + 0x1.8p-24) == 1 && __double2float_rz(-1e300) == -0x1.fffffep127f,
         "rounding to zero");
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([] {
      for (int round = 0; round < 10; ++round) {
        reverse();
        last_block();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void correct_kernels() {
  last_block();
  all_fence();
  reverse();
  neighbour();
  pipeline();
  multiply<1>();
  multiply<2>();
  multiply<4>();
  arrivals();
  orders();
  int failures = 0;
  emulated_launch(collectives_kernel, 2, 96, 0, nullptr, &failures);
  expect(failures == 0, "shuffles and votes");
  for (int round = 0; round < 2; ++round)
    emulated_launch(unwritten_kernel, 2, 1, 7 * sizeof(double), nullptr, &failures);
  expect(failures == 0, "unwritten shared memory is garbage");
  std::vector<int> visits(6 * 24);
  emulated_launch(geometry_kernel, dim3(1, 2, 3), dim3(4, 3, 2), 0, nullptr, visits.data());
  for (int count : visits) expect(count == 1, "every thread of three dimensions once");
}

// What follows is wrong.

__global__ void exit_before_barrier_kernel() {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle_kernel() {
  if (threadIdx.x % 2 == 0) __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void partial_mask_kernel() { __shfl_sync(0xffffu, 1, 0); }

__global__ void dynamic_overrun_kernel() { emulation::dynamic_shared()[threadIdx.x] = 1; }

__global__ void static_overrun_kernel(int n) {
  __shared__ int stage[8];
  for (volatile int* at = stage; at != stage + n; ++at) *at = 1;
}

__global__ void misaligned_kernel(const float* x, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(x + threadIdx.x);
  out[threadIdx.x] = four.x;
}

__global__ void unordered_blocks_kernel(int* total) { *total += 1; }

int wrong_kernel(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  float x[16] = {}, out[16];
  int total = 0;
  if (is("exit_before_barrier")) emulated_launch(exit_before_barrier_kernel, 1, 64, 0, nullptr);
  if (is("two_barriers")) emulated_launch(two_barriers_kernel, 1, 64, 0, nullptr);
  if (is("divergent_shuffle")) emulated_launch(divergent_shuffle_kernel, 1, 32, 0, nullptr);
  if (is("partial_mask")) emulated_launch(partial_mask_kernel, 1, 32, 0, nullptr);
  if (is("half_a_warp")) emulated_launch(neighbour_kernel<true>, 1, 16, 0, nullptr, &total);
  if (is("dynamic_overrun")) emulated_launch(dynamic_overrun_kernel, 1, 32, 31, nullptr);
  if (is("static_overrun")) emulated_launch(static_overrun_kernel, 1, 1, 0, nullptr, 9);
  if (is("misaligned")) emulated_launch(misaligned_kernel, 1, 2, 0, nullptr, x, out);
  if (is("missing_barrier")) reverse<false>();
  if (is("missing_warp_barrier")) neighbour<false>();
  if (is("missing_release")) last_block<false, true>();
  if (is("missing_acquire")) last_block<true, false>();
  if (is("missing_wait")) pipeline<2>();
  if (is("unordered_blocks")) emulated_launch(unordered_blocks_kernel, 2, 1, 0, nullptr, &total);
  std::puts("survived");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return wrong_kernel(argv[1]);
  emulation::Options& set = emulation::options();
  for (Order blocks : {Order::kAscending, Order::kDescending, Order::kRandom}) {
    for (Order threads : {Order::kAscending, Order::kDescending, Order::kRandom}) {
      set.blocks = blocks;
      set.threads = threads;
      set.seed += 1;
      correct_kernels();
    }
  }
  runtime();
  several_callers();
  std::puts("passed");
}
