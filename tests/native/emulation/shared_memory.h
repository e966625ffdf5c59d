// Where the `__shared__` variables of a kernel are.
//
// They are static variables that carry an ABI tag, and kernels carry another one: both tags end up in the
// mangled names, so that the symbol table of the program tells which memory a block must not rely on.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#define EMULATION_SHARED_TAG "shared_memory"
#define EMULATION_KERNEL_TAG "kernel"

namespace emulation {

struct Region {
  void* begin;
  std::size_t bytes;
};

struct KernelSymbols {
  std::string name;             // demangled
  std::vector<Region> regions;  // `__shared__` variables of the kernel and of the device functions
  std::size_t shared_bytes = 0;
};

// Empty in a stripped program.
const KernelSymbols& symbols_of(const void* kernel);

// All bits set: NaN in every floating-point format, -1 as an integer. And nobody has touched it.
void fill_with_garbage(void* memory, std::size_t bytes);

}  // namespace emulation
