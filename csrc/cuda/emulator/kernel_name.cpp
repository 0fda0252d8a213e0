// Kernel names: see kernel_name.h. Kernels live in anonymous namespaces, which dladdr() does not know; the full symbol
// table of the ELF file does.
#include "cuda/emulator/kernel_name.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <vector>

namespace glam::cuda::emulator {
namespace {

using Bytes = std::vector<char>;

template <class T>
T at(const Bytes& file, size_t offset) {
  T value{};
  if (offset + sizeof(T) <= file.size()) std::memcpy(&value, file.data() + offset, sizeof(T));
  return value;
}

// The mangled name of the function `offset` bytes after the file's load address; empty if it is not there.
std::string find_symbol(const Bytes& file, uintptr_t offset) {
  const auto header = at<ElfW(Ehdr)>(file, 0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return {};
  const auto section = [&](size_t i) { return at<ElfW(Shdr)>(file, header.e_shoff + i * header.e_shentsize); };
  for (size_t i = 0; i < header.e_shnum; ++i) {
    const auto table = section(i);
    if (table.sh_type != SHT_SYMTAB) continue;
    const auto names = section(table.sh_link);
    for (size_t j = 0; j * sizeof(ElfW(Sym)) < table.sh_size; ++j) {
      const auto symbol = at<ElfW(Sym)>(file, table.sh_offset + j * sizeof(ElfW(Sym)));
      if (symbol.st_value != offset || ELF64_ST_TYPE(symbol.st_info) != STT_FUNC) continue;
      const size_t name = names.sh_offset + symbol.st_name;
      if (name < file.size()) return file.data() + name;  // the file ends with a null, added by the reader
    }
  }
  return {};
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 ? text : symbol;
  std::free(text);
  return name;
}

// "void a::(anonymous namespace)::k<float, a::B>(float const*)" is "k<float, B>".
std::string shortened(std::string name) {
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t i; (i = name.find(anonymous)) != std::string::npos;) name.erase(i, anonymous.size());
  name = name.substr(0, name.find('('));
  std::string result;
  size_t word = 0;  // where the word that is being read starts in the result
  for (size_t i = 0; i < name.size(); ++i) {
    if (name.compare(i, 2, "::") == 0) {
      result.resize(word);
      ++i;
      continue;
    }
    result += name[i];
    if (std::strchr(" <>,", name[i])) word = result.size();
  }
  return result.starts_with("void ") ? result.substr(5) : result;
}

std::string look_up(const void* kernel) {
  Dl_info info;
  link_map* map = nullptr;
  if (!dladdr1(kernel, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP)) return {};
  const char* path = map->l_name && *map->l_name ? map->l_name : "/proc/self/exe";
  static std::map<std::string, Bytes> files;
  auto [entry, is_new] = files.try_emplace(path);
  if (is_new) {
    std::ifstream stream(path, std::ios::binary);
    entry->second.assign(std::istreambuf_iterator<char>(stream), {});
    entry->second.push_back('\0');
  }
  return find_symbol(entry->second, reinterpret_cast<uintptr_t>(kernel) - map->l_addr);
}

}  // namespace

const std::string& kernel_name(const void* kernel) {
  static std::map<const void*, std::string> names;
  auto [entry, is_new] = names.try_emplace(kernel, "a kernel");
  if (is_new) {
    const std::string symbol = look_up(kernel);
    if (!symbol.empty()) entry->second = shortened(demangled(symbol));
  }
  return entry->second;
}

}  // namespace glam::cuda::emulator
