// Stacks of their own that one OS thread switches between, known to the sanitizers.
#pragma once

#include <cstddef>

#include "sanitizers.h"

#if !defined(__x86_64__) || defined(EMULATION_UCONTEXT)
#define EMULATION_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulation {

// A stack and what is saved while it does not run. The thread that switches to fibers has one for its own
// stack, which `create_fiber` has not seen.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;    // AddressSanitizer
  void* tsan_context = nullptr;  // ThreadSanitizer
#ifdef EMULATION_USES_UCONTEXT
  ucontext_t context;
#endif
};

// A fiber that calls `body`, which never returns, when first switched to. `color` spreads the tops of the
// stacks over the cache, where equal offsets within a page would share few lines.
void create_fiber(Fiber& fiber, void (*body)(), unsigned color);

void switch_fiber(Fiber& from, Fiber& to);

}  // namespace emulation
