#include "shared_memory.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "sanitizers.h"

namespace emulation {
namespace {

struct Symbol {
  std::string name;
  std::uintptr_t address;
  std::size_t bytes;
};

struct Symbols {
  std::vector<Symbol> kernels, shared;
};

struct Module {
  std::string path;
  std::uintptr_t base = 0;
};

// An ABI tag as the mangled names spell it.
std::string mangled_tag(const std::string& tag) { return "B" + std::to_string(tag.size()) + tag; }

int find_module(dl_phdr_info* info, std::size_t, void* found) {
  const auto here = reinterpret_cast<std::uintptr_t>(&symbols_of);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    if (info->dlpi_phdr[i].p_type != PT_LOAD || here < begin || here - begin >= info->dlpi_phdr[i].p_memsz)
      continue;
    const bool is_program = info->dlpi_name == nullptr || info->dlpi_name[0] == '\0';
    *static_cast<Module*>(found) = {is_program ? "/proc/self/exe" : info->dlpi_name, info->dlpi_addr};
    return 1;
  }
  return 0;
}

std::vector<char> read_file(const std::string& path) {
  std::vector<char> bytes;
  if (std::FILE* file = std::fopen(path.c_str(), "rb")) {
    char part[1 << 16];
    for (std::size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;)
      bytes.insert(bytes.end(), part, part + n);
    std::fclose(file);
  }
  return bytes;
}

Symbols read_symbols() {
  Module module;
  dl_iterate_phdr(find_module, &module);
  const std::vector<char> image = read_file(module.path);
  Symbols symbols;
  if (image.size() < sizeof(ElfW(Ehdr))) return symbols;
  ElfW(Ehdr) header;
  std::memcpy(&header, image.data(), sizeof header);
  std::vector<ElfW(Shdr)> sections(header.e_shnum);
  std::memcpy(sections.data(), image.data() + header.e_shoff, sections.size() * sizeof(sections[0]));
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const char* names = image.data() + sections[section.sh_link].sh_offset;
    for (std::size_t at = 0; at < section.sh_size; at += sizeof(ElfW(Sym))) {
      ElfW(Sym) entry;
      std::memcpy(&entry, image.data() + section.sh_offset + at, sizeof entry);
      const std::string name = names + entry.st_name;
      const Symbol symbol{name, module.base + entry.st_value, entry.st_size};
      const int type = entry.st_info & 15;
      if (type == STT_FUNC && name.find(mangled_tag(EMULATION_KERNEL_TAG)) != std::string::npos) {
        symbols.kernels.push_back(symbol);
      } else if (type == STT_OBJECT && name.compare(0, 3, "_ZZ") == 0 &&
                 name.find(mangled_tag(EMULATION_SHARED_TAG)) != std::string::npos) {
        symbols.shared.push_back(symbol);
      }
    }
  }
  return symbols;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = readable != nullptr ? readable : name;
  std::free(readable);
  return result;
}

KernelSymbols select(const Symbols& symbols, const void* kernel) {
  KernelSymbols selected;
  std::string encoding;  // "kernel(float*)" of _Z6kernelPf, as it stands in the names of its variables
  for (const Symbol& symbol : symbols.kernels) {
    if (symbol.address != reinterpret_cast<std::uintptr_t>(kernel)) continue;
    selected.name = demangled(symbol.name);
    encoding = symbol.name.substr(2) + "E";
  }
  const std::string tag = mangled_tag(EMULATION_KERNEL_TAG);
  for (const Symbol& symbol : symbols.shared) {
    const bool of_a_kernel = symbol.name.find(tag) != std::string::npos;
    if (of_a_kernel && symbol.name.find(encoding) == std::string::npos) continue;
    selected.regions.push_back({reinterpret_cast<void*>(symbol.address), symbol.bytes});
    if (of_a_kernel) selected.shared_bytes += symbol.bytes;
  }
  return selected;
}

}  // namespace

const KernelSymbols& symbols_of(const void* kernel) {
  static const Symbols symbols = read_symbols();
  static std::map<const void*, KernelSymbols> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(kernel);
  return found != known.end() ? found->second : known.emplace(kernel, select(symbols, kernel)).first->second;
}

EMULATION_UNCHECKED void fill_with_garbage(void* memory, std::size_t bytes) {
  // Volatile, lest the loops become a memset, which ThreadSanitizer watches.
  auto* byte = static_cast<volatile unsigned char*>(memory);
  auto* const end = byte + bytes;
  for (; byte != end && reinterpret_cast<std::uintptr_t>(byte) % 8 != 0; ++byte) *byte = 0xff;
  for (; end - byte >= 8; byte += 8) *reinterpret_cast<volatile std::uint64_t*>(byte) = ~std::uint64_t{0};
  for (; byte != end; ++byte) *byte = 0xff;
  tsan::forget(memory, bytes);
}

}  // namespace emulation
