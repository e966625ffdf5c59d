#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace emulation {
namespace {

// Sanitizers put red zones around every local variable.
constexpr std::size_t kStackBytes = EMULATION_ASAN || EMULATION_TSAN ? 256 << 10 : 64 << 10;

Fiber* left = nullptr;  // the fiber that was switched away from

EMULATION_UNCHECKED void arrive([[maybe_unused]] void* fake_stack) {
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &left->stack, &left->stack_bytes);
#endif
}

// One page below the stack stays without access, so that an overflow stops the program.
char* allocate_stack() {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("emulation: no memory for the stack of a fiber");
    std::abort();
  }
  return static_cast<char*>(memory) + page;
}

#ifdef EMULATION_USES_UCONTEXT

// makecontext passes int arguments only.
void (*starting_body)() = nullptr;

EMULATION_UNCHECKED void start() {
  arrive(nullptr);
  starting_body();
}

void prepare(Fiber& fiber, void (*body)(), std::size_t used) {
  starting_body = body;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
  fiber.context.uc_stack.ss_size = fiber.stack_bytes - used;
  makecontext(&fiber.context, start, 0);
}

EMULATION_UNCHECKED void switch_stack(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// swapcontext saves the signal mask, which is a system call at every switch. Here only the registers that a
// callee must keep are saved, on the stack that is left.
extern "C" void mtl_emulation_switch_stack(void** saved, void* stack_pointer);
asm(R"(
.text
.p2align 4
.globl mtl_emulation_switch_stack
.hidden mtl_emulation_switch_stack
.type mtl_emulation_switch_stack, @function
mtl_emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mtl_emulation_switch_stack, .-mtl_emulation_switch_stack
)");

void (*starting_body)() = nullptr;

EMULATION_UNCHECKED void start() {
  arrive(nullptr);
  starting_body();
}

// What the first switch pops: six registers and the address of `start`, above which the stack is aligned as
// after a call.
void prepare(Fiber& fiber, void (*body)(), std::size_t used) {
  starting_body = body;
  const auto top = reinterpret_cast<std::uintptr_t>(fiber.stack) + fiber.stack_bytes - used;
  auto* frame = reinterpret_cast<std::uintptr_t*>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<std::uintptr_t>(&start);
  fiber.stack_pointer = frame;
}

EMULATION_UNCHECKED void switch_stack(Fiber& from, Fiber& to) {
  mtl_emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#endif

}  // namespace

void create_fiber(Fiber& fiber, void (*body)(), unsigned color) {
  fiber.stack = allocate_stack();
  fiber.stack_bytes = kStackBytes;
  fiber.tsan_context = tsan::create();
  prepare(fiber, body, color % 31 * 128);
}

EMULATION_UNCHECKED void switch_fiber(Fiber& from, Fiber& to) {
  left = &from;
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  tsan::switch_to(to.tsan_context);
  switch_stack(from, to);
  arrive(from.fake_stack);
}

}  // namespace emulation
