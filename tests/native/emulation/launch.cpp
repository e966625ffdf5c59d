#include "launch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim{}, gridDim{};

namespace emulation {
namespace {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxWarps = kMaxThreads / kWarp;

// To ThreadSanitizer a fiber is a thread, whose own accesses are ordered. Blocks take turns with several sets
// of fibers, so that what they share needs an order of its own; with few sets the same threads of two blocks
// would too often be one fiber.
constexpr int kSets = EMULATION_TSAN ? 5 : 1;

struct Site {
  const char* name;  // of the collective
  Where where;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes, group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int rank;        // in the block
  int warp, turn;  // where it stands in the order of the warps, and of the lanes of its warp
  bool returned;
  Site site;             // where it waits
  unsigned collectives;  // of its block and of its warp so far
  unsigned barriers;
  std::vector<Copy> copies;
  int copy_groups;

  // ThreadSanitizer
  void* atomics[8];  // since the last fence or barrier
  int num_atomics;
  alignas(16) unsigned char received[EMULATION_TSAN ? kWarp * kLargestDeposit : 1];
};

// Lanes and warps are numbered by their turn; bit i of a mask stands for turn i.
struct Warp {
  Thread* lanes[kWarp];
  unsigned all;       // the turns that exist
  unsigned runnable;  // the turns that do not wait
  int arrived;        // at the collective `site`
  Site site;
  std::size_t deposit_bytes;
  // Deposits of one collective are read while those of the next are written.
  alignas(16) unsigned char deposits[2][kWarp * kLargestDeposit];
};

// Addresses that order the threads of a block for ThreadSanitizer. A thread that goes on first may reach the
// next barrier before the others leave this one: with one address for both they would seem to have seen what
// it did in between.
struct BlockOrder {
  std::uint64_t barriers[2], warps[kMaxWarps][2];
  std::uint64_t offered, seen;  // see fence()
};

// The one block that runs in this process.
struct Block {
  Warp warps[kMaxWarps];
  unsigned all, runnable;  // as in Warp
  int threads, returned;
  int arrived, votes, votes_of_last;  // at the barrier `site`
  Site site;
  BlockOrder* order;
};

Block block;
Fiber home;  // the OS thread that launched
Thread* running = nullptr;
const KernelSymbols* kernel_symbols = nullptr;
unsigned char* dynamic_memory = nullptr;
void (*call_kernel)(const void*) = nullptr;
const void* kernel_arguments = nullptr;
std::uint64_t launched, finished;  // order the launch after the past of the OS thread, and before its future

std::string text(const Site& site) {
  return std::string(site.name) + " (" + site.where.file + ":" + std::to_string(site.where.line) + ")";
}

EMULATION_UNCHECKED bool same(const Site& a, const Site& b) {
  return a.where.line == b.where.line && a.name == b.name;
}

EMULATION_UNCHECKED std::string state_of(const Thread& thread) {
  if (thread.returned) return "have returned";
  const bool waits = (block.warps[thread.warp].runnable >> thread.turn & 1) == 0;
  return waits || &thread == running ? "wait at " + text(thread.site) : "have not arrived";
}

// Nobody can go on although not all have returned, or threads wait at different places.
[[noreturn]] EMULATION_UNCHECKED void fail_diverged() {
  std::vector<std::pair<std::string, int>> counts;
  for (int w = 0; w < kMaxWarps && (block.all >> w & 1) != 0; ++w) {
    for (int turn = 0; turn < kWarp && (block.warps[w].all >> turn & 1) != 0; ++turn) {
      const std::string state = state_of(*block.warps[w].lanes[turn]);
      auto found = std::find_if(counts.begin(), counts.end(), [&](auto& c) { return c.first == state; });
      if (found == counts.end()) found = counts.insert(counts.end(), {state, 0});
      found->second += 1;
    }
  }
  std::string message = "divergent barrier";
  for (const auto& [state, count] : counts)
    message += (&state == &counts[0].first ? ": " : ", ") + std::to_string(count) + " threads " + state;
  fail(message.c_str());
}

EMULATION_UNCHECKED void switch_to_next() {
  Thread& self = *running;
  Warp* warp = &block.warps[self.warp];
  if (warp->runnable == 0) {
    block.runnable &= ~(1u << self.warp);
    if (block.runnable == 0) {
      if (block.returned != block.threads) fail_diverged();
      switch_fiber(self.fiber, home);
      return;
    }
    warp = &block.warps[__builtin_ctz(block.runnable)];
  }
  Thread& next = *warp->lanes[__builtin_ctz(warp->runnable)];
  if (&next == &self) return;
  running = &next;
  threadIdx = next.index;
  switch_fiber(self.fiber, next.fiber);
}

EMULATION_UNCHECKED void run_thread() {
  for (;;) {
    tsan::acquire(&launched);
    running->copies.clear();
    running->copy_groups = 0;
    running->num_atomics = 0;
    call_kernel(kernel_arguments);
    tsan::release(&finished);
    running->returned = true;
    block.returned += 1;
    block.warps[running->warp].runnable &= ~(1u << running->turn);
    switch_to_next();
  }
}

// The fibers of all launches. They live as long as the process.
Thread& pooled_thread(int set, int rank) {
  static std::vector<std::unique_ptr<Thread>> pools[kSets];
  auto& pool = pools[set];
  while (pool.size() <= static_cast<std::size_t>(rank)) {
    pool.push_back(std::make_unique<Thread>());
    create_fiber(pool.back()->fiber, run_thread, static_cast<unsigned>(pool.size()));
  }
  return *pool[static_cast<std::size_t>(rank)];
}

struct Generator {  // splitmix64
  std::uint64_t state;
  std::size_t below(std::size_t n) {
    std::uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % n;
  }
};

std::vector<int> permutation(std::size_t n, Order order, Generator& generator) {
  std::vector<int> turns(n);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::kDescending) std::reverse(turns.begin(), turns.end());
  for (std::size_t i = n; order == Order::kRandom && i > 1; --i)
    std::swap(turns[i - 1], turns[generator.below(i)]);
  return turns;
}

// Puts the threads of the next block where their turns are.
EMULATION_UNCHECKED void seat_threads(int set, dim3 dim, Generator& generator) {
  const auto threads = static_cast<int>(dim.x * dim.y * dim.z);
  const int warps = (threads + kWarp - 1) / kWarp;
  block.threads = threads;
  block.returned = block.arrived = block.votes = 0;
  block.all = block.runnable = ~0u >> (32 - warps);
  const Order order = options().threads;
  const std::vector<int> warp_order = permutation(static_cast<std::size_t>(warps), order, generator);
  for (int w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    const int first = warp_order[static_cast<std::size_t>(w)] * kWarp;
    const int lanes = std::min(threads - first, kWarp);
    const std::vector<int> lane_order = permutation(static_cast<std::size_t>(lanes), order, generator);
    warp.all = warp.runnable = ~0u >> (32 - lanes);
    warp.arrived = 0;
    for (int turn = 0; turn < lanes; ++turn) {
      Thread& thread = pooled_thread(set, first + lane_order[static_cast<std::size_t>(turn)]);
      const auto rank = static_cast<unsigned>(first + lane_order[static_cast<std::size_t>(turn)]);
      thread.rank = static_cast<int>(rank);
      thread.index = {rank % dim.x, rank / dim.x % dim.y, rank / (dim.x * dim.y)};
      thread.warp = w;
      thread.turn = turn;
      thread.returned = false;
      thread.collectives = thread.barriers = 0;
      warp.lanes[turn] = &thread;
    }
  }
}

EMULATION_UNCHECKED void run_block(int set, unsigned rank, std::size_t dynamic_bytes, Generator& generator) {
  blockIdx = {rank % gridDim.x, rank / gridDim.x % gridDim.y, rank / (gridDim.x * gridDim.y)};
  for (const Region& region : kernel_symbols->regions) fill_with_garbage(region.begin, region.bytes);
  fill_with_garbage(dynamic_memory, dynamic_bytes);
  seat_threads(set, blockDim, generator);
  // New addresses for every block: those of the last one would order the blocks.
  const auto order = std::make_unique<BlockOrder>();
  block.order = order.get();
  tsan::release(&launched);
  running = block.warps[0].lanes[0];
  threadIdx = running->index;
  switch_fiber(home, running->fiber);
}

// Blocks until all lanes of the warp are here. Returns the parity of this collective.
EMULATION_UNCHECKED unsigned arrive_at_warp(Thread& self, const Site& site, std::size_t bytes,
                                            unsigned mask) {
  Warp& warp = block.warps[self.warp];
  self.site = site;
  if (mask != kFullWarp) fail("only collectives of whole warps (mask 0xffffffff) are emulated");
  if (warp.all != kFullWarp) fail("a collective of a warp that has less than 32 threads");
  if (warp.arrived == 0) {
    warp.site = site;
    warp.deposit_bytes = bytes;
  } else if (!same(warp.site, site) || warp.deposit_bytes != bytes) {
    fail_diverged();
  }
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    warp.runnable = warp.all;
  } else {
    warp.runnable &= ~(1u << self.turn);
  }
  const unsigned parity = self.collectives++ % 2;
  switch_to_next();
  return parity;
}

EMULATION_UNCHECKED void copy_bytes(unsigned char* to, const unsigned char* from, std::size_t bytes) {
#if EMULATION_TSAN
  for (std::size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(to)[i] = from[i];
#else
  std::memcpy(to, from, bytes);
#endif
}

// For functions that are checked: what they change belongs to the thread, the pointer to it does not.
EMULATION_UNCHECKED Thread& self() { return *running; }

// The last block to arrive resets the counter by a plain store. Nothing but the address they share orders it
// after the atomics of the other blocks.
EMULATION_UNCHECKED void forget_atomics(Thread& thread) {
  for (; thread.num_atomics > 0; --thread.num_atomics)
    tsan::forget(thread.atomics[thread.num_atomics - 1], 4);
}

}  // namespace

Options& options() {
  static Options set;
  return set;
}

void fail(const char* what) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulation: %s\n  in %s, block (%u, %u, %u), thread (%u, %u, %u)\n", what,
               kernel_symbols != nullptr ? kernel_symbols->name.c_str() : "?", blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

EMULATION_UNCHECKED int lane() { return running->rank % kWarp; }

unsigned char* dynamic_shared() { return dynamic_memory; }

EMULATION_UNCHECKED int block_barrier(const char* name, bool predicate, Where where) {
  Thread& self = *running;
  self.site = {name, where};
  if (block.arrived == 0) block.site = self.site;
  if (!same(block.site, self.site)) fail_diverged();
  void* order = &block.order->barriers[self.barriers++ % 2];
  tsan::release(order);
  block.votes += predicate ? 1 : 0;
  if (++block.arrived == block.threads) {
    block.votes_of_last = block.votes;
    block.arrived = block.votes = 0;
    block.runnable = block.all;
    for (int w = 0; w < kMaxWarps && (block.all >> w & 1) != 0; ++w)
      block.warps[w].runnable = block.warps[w].all;
  } else {
    block.warps[self.warp].runnable &= ~(1u << self.turn);
  }
  switch_to_next();
  tsan::acquire(order);
  forget_atomics(self);
  return block.votes_of_last;
}

EMULATION_UNCHECKED void warp_barrier(unsigned mask, Where where) {
  Thread& self = *running;
  void* order = &block.order->warps[self.warp][self.collectives % 2];
  tsan::release(order);
  arrive_at_warp(self, {"__syncwarp", where}, 0, mask);
  tsan::acquire(order);
}

EMULATION_UNCHECKED const void* exchange(const char* name, const void* mine, std::size_t bytes, unsigned mask,
                                         Where where) {
  Thread& self = *running;
  auto& deposits = block.warps[self.warp].deposits[self.collectives % 2];
  copy_bytes(deposits + static_cast<std::size_t>(lane()) * bytes, static_cast<const unsigned char*>(mine),
             bytes);
  arrive_at_warp(self, {name, where}, bytes, mask);
  if (!EMULATION_TSAN) return deposits;
  copy_bytes(self.received, deposits, kWarp * bytes);  // which the others have not ordered for this lane
  return self.received;
}

void copy_async(void* to, const void* from, int bytes, int valid_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes");
  const auto alignment = static_cast<std::uintptr_t>(bytes);
  if (reinterpret_cast<std::uintptr_t>(to) % alignment != 0 ||
      reinterpret_cast<std::uintptr_t>(from) % alignment != 0)
    fail("misaligned cp.async");
  std::memset(to, 0xff, static_cast<std::size_t>(bytes));
  Thread& thread = self();
  thread.copies.push_back({to, from, bytes, valid_bytes, thread.copy_groups});
}

void copy_commit() { self().copy_groups += 1; }

void copy_wait(int newest_groups_left) {
  std::vector<Copy>& copies = self().copies;
  const int end = self().copy_groups - newest_groups_left;
  std::size_t done = 0;
  for (; done < copies.size() && copies[done].group < end; ++done) {
    const Copy& copy = copies[done];
    const auto valid = static_cast<std::size_t>(copy.valid_bytes);
    if (valid > 0) std::memcpy(copy.to, copy.from, valid);
    std::memset(static_cast<unsigned char*>(copy.to) + valid, 0,
                static_cast<std::size_t>(copy.bytes) - valid);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

#if EMULATION_TSAN
// A fence offers what its thread has done, and learns what the atomics of its block have seen. An atomic
// makes the offers of its block known to the atomics of other blocks that follow. A context of
// ThreadSanitizer in which nothing runs keeps what is known. That is coarser than CUDA: it tells no threads
// of a block apart, and no addresses.
EMULATION_UNCHECKED void after_atomic(void* address) {
  static void* const known = tsan::create();
  Thread& thread = self();
  tsan::switch_to(known);
  tsan::acquire(&block.order->offered);
  tsan::release(&block.order->seen);
  tsan::switch_to(thread.fiber.tsan_context);
  if (thread.num_atomics < 8) thread.atomics[thread.num_atomics++] = address;
}

EMULATION_UNCHECKED void fence() {
  tsan::release(&block.order->offered);
  tsan::acquire(&block.order->seen);
  forget_atomics(self());
}
#endif

cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block_dim, std::size_t dynamic_shared_bytes,
                     void (*call)(const void*), const void* arguments) {
  const cudaError_t refused = remember(check_launch(
      kernel, {grid.x, grid.y, grid.z}, {block_dim.x, block_dim.y, block_dim.z}, dynamic_shared_bytes));
  if (refused != cudaSuccess) return refused;
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  kernel_symbols = &symbols_of(kernel);
  call_kernel = call;
  kernel_arguments = arguments;
  gridDim = grid;
  blockDim = block_dim;
  home.tsan_context = tsan::current();
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, dynamic_shared_bytes) != 0) return remember(cudaErrorMemoryAllocation);
  dynamic_memory = static_cast<unsigned char*>(memory);

  Generator generator{options().seed};
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  int set = 0;
  for (const int b : permutation(blocks, options().blocks, generator)) {
    run_block(set, static_cast<unsigned>(b), dynamic_shared_bytes, generator);
    set = (set + 1) % kSets;
  }
  tsan::acquire(&finished);
  std::free(memory);
  kernel_symbols = nullptr;
  return cudaSuccess;
}

}  // namespace emulation
