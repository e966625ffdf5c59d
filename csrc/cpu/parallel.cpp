#include "parallel.h"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mtl::cpu::detail {
namespace {

// How long an idle worker watches for the next loop before it sleeps: gram, solve and combine follow each
// other within this time, and a sleeping thread costs tens of microseconds to wake.
constexpr auto kSpin = std::chrono::microseconds(30);

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // Returns false when another caller is using the pool.
  bool run(std::int64_t n, int threads, Body body, void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    std::int64_t wanted = (threads < n ? threads : n) - 1;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      wanted = start_workers(wanted);
      std::fegetenv(&environment_);
      body_ = body;
      context_ = context;
      n_ = n;
      next_.store(0, std::memory_order_relaxed);
      places_ = wanted;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain(n, body, context);
    {
      // A worker that has not come yet is not waited for: it finds no place left.
      std::lock_guard<std::mutex> guard(mutex_);
      places_ = 0;
    }
    while (active_.load(std::memory_order_acquire) != 0) relax();
    if (thrown_ != nullptr) std::rethrow_exception(std::exchange(thrown_, nullptr));
    return true;
  }

 private:
  // Returns how many of the workers wanted there are: the system may allow no more threads.
  std::int64_t start_workers(std::int64_t wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::work, this).detach();
    } catch (const std::system_error&) {
      return workers_;
    }
    return wanted;
  }

  void drain(std::int64_t n, Body body, void* context) {
    try {
      for (;;) {
        const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= n) return;
        body(context, i);
      }
    } catch (...) {
      next_.store(n, std::memory_order_relaxed);
      std::lock_guard<std::mutex> guard(mutex_);
      if (thrown_ == nullptr) thrown_ = std::current_exception();
    }
  }

  void work() {
    std::uint64_t seen = 0;
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + kSpin;
      while (generation_.load(std::memory_order_acquire) == seen &&
             std::chrono::steady_clock::now() < deadline)
        relax();
      Body body;
      void* context;
      std::int64_t n;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        seen = generation_.load(std::memory_order_acquire);
        body = body_;
        context = context_;
        n = n_;
        if (places_ == 0) continue;
        --places_;
        std::fesetenv(&environment_);
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      drain(n, body, context);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex owner_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> active_{0};
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::int64_t n_ = 0;
  std::fenv_t environment_;  // of the caller: a worker rounds and flushes denormals as it does
  std::exception_ptr thrown_;
  std::int64_t places_ = 0;
  std::int64_t workers_ = 0;
};

// Never destroyed: its detached workers may outlive static destruction.
Pool* pool = new Pool;

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of its parent's threads, and may have copied a held lock: start over.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif

}  // namespace

void run(std::int64_t n, int threads, Body body, void* context) {
  if (pool->run(n, threads, body, context)) return;
  for (std::int64_t i = 0; i < n; ++i) body(context, i);
}

}  // namespace mtl::cpu::detail
