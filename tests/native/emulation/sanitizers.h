// What the emulation tells the sanitizers. Every function here is empty in a build without them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define EMULATION_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMULATION_TSAN 1
#endif
#endif
#ifndef EMULATION_ASAN
#define EMULATION_ASAN 0
#endif
#ifndef EMULATION_TSAN
#define EMULATION_TSAN 0
#endif

// For the emulation's own bookkeeping: it is shared by fibers that, to ThreadSanitizer, are unordered
// threads. Such a function calls only functions of its kind, and no memcpy or memset, which are intercepted.
#define EMULATION_UNCHECKED __attribute__((no_sanitize("thread")))

#if EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#if EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_java_alloc(unsigned long address, unsigned long bytes);
void __tsan_java_free(unsigned long address, unsigned long bytes);
}
#endif

namespace emulation::tsan {

constexpr unsigned kOrdersNothing = 1;  // __tsan_switch_to_fiber_no_sync

#if EMULATION_TSAN
EMULATION_UNCHECKED inline void acquire(void* address) { __tsan_acquire(address); }
EMULATION_UNCHECKED inline void release(void* address) { __tsan_release(address); }
EMULATION_UNCHECKED inline void* create() { return __tsan_create_fiber(0); }
EMULATION_UNCHECKED inline void* current() { return __tsan_get_current_fiber(); }
EMULATION_UNCHECKED inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, kOrdersNothing); }

// Forgets who touched this memory. The hooks of the Java interface are the only ones that do so without
// ordering anything.
EMULATION_UNCHECKED inline void forget(void* memory, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory) / 8 * 8;
  const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes + 7) / 8 * 8;
  if (begin == end) return;
  __tsan_java_free(begin, end - begin);
  __tsan_java_alloc(begin, end - begin);
}
#else
inline void acquire(void*) {}
inline void release(void*) {}
inline void* create() { return nullptr; }
inline void* current() { return nullptr; }
inline void switch_to(void*) {}
inline void forget(void*, std::size_t) {}
#endif

}  // namespace emulation::tsan
