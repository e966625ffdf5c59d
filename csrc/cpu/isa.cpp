#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mtl::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

const Kernels* find(const char* name) {
  const Choice choices[] = {
#if defined(MTL_X86_KERNELS)
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("fma")},
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline::kernels, true},
  };
  for (const Choice& choice : choices)
    if (choice.supported && (name == nullptr || std::strcmp(name, choice.kernels->name) == 0))
      return choice.kernels;
  return nullptr;
}

const Kernels*& current() {
  static const Kernels* chosen = [] {
    const Kernels* named = find(std::getenv("MTL_KERNELS_ISA"));
    return named != nullptr ? named : find(nullptr);
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

bool use_isa(const char* name) {
  const Kernels* found = find(name);
  if (found == nullptr) return false;
  current() = found;
  return true;
}

}  // namespace mtl::cpu
