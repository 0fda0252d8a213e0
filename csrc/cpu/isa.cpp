// Choice of the instruction set of the CPU kernels; see isa.h.

#include "cpu/isa.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace glam {
namespace {

struct IsaEntry {
  Isa isa;
  std::string_view name;
  bool compiled;
};

#ifdef GLAM_HAVE_AVX2
constexpr bool kHaveAvx2 = true;
#else
constexpr bool kHaveAvx2 = false;
#endif
#ifdef GLAM_HAVE_AVX512
constexpr bool kHaveAvx512 = true;
#else
constexpr bool kHaveAvx512 = false;
#endif

// Narrowest first: the choice takes the last usable one.
constexpr std::array kIsas{
    IsaEntry{Isa::baseline, "baseline", true},    IsaEntry{Isa::avx2, "avx2", kHaveAvx2},
    IsaEntry{Isa::avx512, "avx512", kHaveAvx512}, IsaEntry{Isa::avx512bf16, "avx512bf16", kHaveAvx512},
    IsaEntry{Isa::amx, "amx", kHaveAvx512},
};

// Linux gives a process the tile registers when it asks for them (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// Exactly the extensions the compiler was allowed to use for that copy of the kernels (CMakeLists.txt).
bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512bf16:
      // All CPUs but those of one server family (Cooper Lake) have both.
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    case Isa::amx:
      return cpu_supports(Isa::avx512bf16) && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

bool usable(const IsaEntry& entry) { return entry.compiled && cpu_supports(entry.isa); }

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

Isa choose_isa() {
  const char* requested = std::getenv("GLAM_CPU_ISA");
  if (requested != nullptr && *requested != '\0') {
    const auto entry = std::find_if(kIsas.begin(), kIsas.end(), [&](const IsaEntry& e) { return e.name == requested; });
    TORCH_CHECK(entry != kIsas.end(),
                "glam: expected GLAM_CPU_ISA to be baseline, avx2, avx512, avx512bf16 or amx, got ", requested);
    TORCH_CHECK(usable(*entry), "glam: expected GLAM_CPU_ISA to name an instruction set that this build (",
                joined(compiled_isas()), ") and this CPU (", joined(supported_isas()), ") both have, got ", requested);
    return entry->isa;
  }
  return std::find_if(kIsas.rbegin(), kIsas.rend(), usable)->isa;
}

}  // namespace

Isa active_isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

std::string isa_name(Isa isa) { return std::string(kIsas[static_cast<size_t>(isa)].name); }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const auto& entry : kIsas)
    if (entry.compiled) names.emplace_back(entry.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& entry : kIsas)
    if (cpu_supports(entry.isa)) names.emplace_back(entry.name);
  return names;
}

}  // namespace glam
