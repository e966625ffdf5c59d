// Runs a grid on the calling OS thread: block after block, and in a block every thread as a fiber that runs
// until it reaches a collective.
//
// Memory is ordered, for ThreadSanitizer, by what orders it in CUDA: __syncthreads in a block, __syncwarp in
// a warp, the end of a launch, and __threadfence around an atomic between blocks. Shuffles, votes and
// `warp_exchange` order nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"
#include "sanitizers.h"
#include "types.h"

namespace emulation {

enum class Order { kAscending, kDescending, kRandom };

// Of the process; set them between launches.
struct Options {
  Order blocks = Order::kAscending;
  Order threads = Order::kAscending;  // of the warps, and of the lanes within a warp, between collectives
  std::uint64_t seed = 0;             // of the random orders
  int multiprocessors = 3;
  int blocks_per_multiprocessor = 2;  // the answer to questions about occupancy
  int compute_capability = 90;
  int single_to_double_ratio = 2;
  int shared_bytes_opt_in = 227 << 10;  // that a block may ask for
  int driver_version = 13000;
  cudaError_t launch_error = cudaSuccess;  // what every launch returns instead of running
  cudaError_t device_error = cudaSuccess;  // what every call about the device returns
  // Another thread captures a stream: what belongs to no stream, as loading a kernel, is refused where the
  // calling thread's capture mode is not relaxed.
  bool capturing_elsewhere = false;
};

Options& options();

// The line of a kernel that a collective is called from.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr std::size_t kLargestDeposit = 256;

[[noreturn]] void fail(const char* what);  // prints it with the kernel, the block and the thread, and aborts

// The number of threads with a predicate other than 0.
int block_barrier(const char* name, bool predicate, Where where);
void warp_barrier(unsigned mask, Where where);
const void* exchange(const char* name, const void* mine, std::size_t bytes, unsigned mask, Where where);
int lane();

// A collective of a warp: every lane leaves a value and gets those of all 32, which stay valid until its next
// collective.
template <class T>
const T* warp_exchange(const T& mine, const char* name = "warp_exchange", unsigned mask = kFullWarp,
                       Where where = Where::here()) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= kLargestDeposit && alignof(T) <= 16);
  return static_cast<const T*>(exchange(name, &mine, sizeof(T), mask, where));
}

// The dynamic shared memory of the block: exactly the bytes of the launch, 128-byte aligned.
unsigned char* dynamic_shared();

// cp.async: `to` holds garbage from here on, until the wait that copies. Bytes beyond `valid_bytes` are
// zeroed.
void copy_async(void* to, const void* from, int bytes, int valid_bytes);
inline void copy_async(void* to, const void* from, int bytes) { copy_async(to, from, bytes, bytes); }
void copy_commit();
void copy_wait(int newest_groups_left);
inline void copy_wait_all() {
  copy_commit();
  copy_wait(0);
}

#if EMULATION_TSAN
void fence();
void after_atomic(void* address);
#else
inline void fence() {}
inline void after_atomic(void*) {}
#endif

cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                     void (*call)(const void* arguments), const void* arguments);

template <class... P>
struct BoundKernel {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  template <std::size_t... i>
  void call(std::index_sequence<i...>) const {
    kernel(std::get<i>(arguments)...);
  }
};

}  // namespace emulation

template <class... P, class... A>
cudaError_t emulated_launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                            cudaStream_t, A&&... arguments) {
  static_assert((std::size_t{0} + ... + sizeof(P)) <= 32764, "kernel parameters take at most 32764 bytes");
  using Bound = emulation::BoundKernel<P...>;
  const Bound bound{kernel, std::tuple<P...>{std::forward<A>(arguments)...}};
  return emulation::run_grid(
      reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared_bytes,
      [](const void* bound) { static_cast<const Bound*>(bound)->call(std::index_sequence_for<P...>{}); },
      &bound);
}
