// Static __shared__ variables are thread-local ones of the host compiler, which no code can list.
// The executable's own symbol table can: those of functions in namespace longspan, without an
// initial value.
#include "tests/emulated_cuda/static_shared.h"

#include <cuda_runtime.h>
#include <elf.h>

#include <cstring>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "tests/emulated_cuda/memory.h"

namespace longspan::emulated {
namespace {

struct Variable {
  std::ptrdiff_t from_reference;  // bytes, the same on every thread
  size_t bytes;
};

template <class T>
std::vector<T> Table(std::ifstream& file, const Elf64_Shdr& section) {
  std::vector<T> entries(section.sh_size / sizeof(T));
  file.seekg(static_cast<std::streamoff>(section.sh_offset));
  file.read(reinterpret_cast<char*>(entries.data()),
            static_cast<std::streamsize>(entries.size() * sizeof(T)));
  return entries;
}

bool IsVariableOfKernel(std::string_view name) {
  return name.starts_with("_ZZ") && name.find("8longspan") != name.npos &&
         name.find("8emulated") == name.npos;
}

std::vector<Variable> FindVariables() {
  std::vector<Variable> found;
  std::ifstream file("/proc/self/exe", std::ios::binary);
  Elf64_Ehdr header{};
  file.read(reinterpret_cast<char*>(&header), sizeof header);
  if (!file || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return found;
  Elf64_Shdr all{};
  all.sh_offset = header.e_shoff;
  all.sh_size = header.e_shnum * sizeof(Elf64_Shdr);
  const auto sections = Table<Elf64_Shdr>(file, all);
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const auto symbols = Table<Elf64_Sym>(file, section);
    const auto names = Table<char>(file, sections[section.sh_link]);
    std::ptrdiff_t reference = -1;
    for (const Elf64_Sym& symbol : symbols) {
      if (ELF64_ST_TYPE(symbol.st_info) != STT_TLS || symbol.st_shndx >= sections.size()) continue;
      const std::string_view name(&names[symbol.st_name]);
      const auto at = static_cast<std::ptrdiff_t>(symbol.st_value);
      if (name == "threadIdx") reference = at;
      if (IsVariableOfKernel(name) && sections[symbol.st_shndx].sh_type == SHT_NOBITS) {
        found.push_back({at, symbol.st_size});
      }
    }
    if (reference < 0) found.clear();
    for (Variable& variable : found) variable.from_reference -= reference;
  }
  return found;
}

}  // namespace

void PoisonStaticShared() {
  static const std::vector<Variable>& variables = *new std::vector<Variable>(FindVariables());
  for (const Variable& variable : variables) {
    std::memset(reinterpret_cast<std::byte*>(&threadIdx) + variable.from_reference, kPoisonByte,
                variable.bytes);
  }
}

}  // namespace longspan::emulated
