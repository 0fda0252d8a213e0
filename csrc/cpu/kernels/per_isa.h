// How a kernel file is compiled for several instruction sets and chosen at run time.
//
// Every file of this folder is compiled once per set with GLAM_ISA = baseline, avx2 or avx512 and puts everything into
// namespace glam::cpu::GLAM_ISA; files named *_bf16.cpp also for avx512bf16 and amx, which add instructions for
// bfloat16 products and nothing else. It exports one constant table of function pointers; the torch side asks for the table of the
// set in use. No torch header here: an inline function of torch compiled for a wide set could be the copy that
// the linker keeps.
#pragma once

#include <type_traits>

#include "cpu/isa.h"

namespace glam::cpu {

template <class Table>
const Table& pick(const Table* baseline, [[maybe_unused]] const std::type_identity_t<Table>* avx2,
                  [[maybe_unused]] const std::type_identity_t<Table>* avx512) {
  switch (active_isa()) {
    case Isa::amx:
    case Isa::avx512bf16:
    case Isa::avx512:
      return *avx512;
    case Isa::avx2:
      return *avx2;
    default:
      return *baseline;
  }
}

// Functions for both accumulation types: a table of most kernel files.
template <template <class> class Functions>
struct TypedTable {
  Functions<float> f32;
  Functions<double> f64;
};

template <class T, template <class> class Functions>
const Functions<T>& functions_for(const TypedTable<Functions>& table) {
  if constexpr (std::is_same_v<T, double>) {
    return table.f64;
  } else {
    return table.f32;
  }
}

}  // namespace glam::cpu

#ifdef GLAM_HAVE_AVX2
#define GLAM_AVX2_TABLE(name) &avx2::name
#else
#define GLAM_AVX2_TABLE(name) nullptr
#endif
#ifdef GLAM_HAVE_AVX512
#define GLAM_AVX512_TABLE(name) &avx512::name
#define GLAM_AVX512BF16_TABLE(name) &avx512bf16::name
#define GLAM_AMX_TABLE(name) &amx::name
#else
#define GLAM_AVX512_TABLE(name) nullptr
#define GLAM_AVX512BF16_TABLE(name) nullptr
#define GLAM_AMX_TABLE(name) nullptr
#endif

// Inside namespace glam::cpu: declares the tables baseline::name, avx2::name, avx512::name and the accessor
// active_name(), which costs a load and a compare.
#define GLAM_PER_ISA_TABLE(Table, name) \
  GLAM_DECLARE_TABLES(Table, name)      \
  inline const Table& active_##name() { return pick(&baseline::name, GLAM_AVX2_TABLE(name), GLAM_AVX512_TABLE(name)); }

// The same for a *_bf16.cpp, with avx512bf16::name and amx::name.
#define GLAM_PER_ISA_TABLE_WITH_BF16(Table, name)                                                         \
  GLAM_DECLARE_TABLES(Table, name)                                                                        \
  namespace avx512bf16 {                                                                                  \
  extern const Table name;                                                                                \
  }                                                                                                       \
  namespace amx {                                                                                         \
  extern const Table name;                                                                                \
  }                                                                                                       \
  inline const Table& active_##name() {                                                                   \
    if (const Table* table = GLAM_AMX_TABLE(name); active_isa() == Isa::amx) return *table;               \
    if (const Table* table = GLAM_AVX512BF16_TABLE(name); active_isa() == Isa::avx512bf16) return *table; \
    return pick(&baseline::name, GLAM_AVX2_TABLE(name), GLAM_AVX512_TABLE(name));                         \
  }

#define GLAM_DECLARE_TABLES(Table, name) \
  namespace baseline {                   \
  extern const Table name;               \
  }                                      \
  namespace avx2 {                       \
  extern const Table name;               \
  }                                      \
  namespace avx512 {                     \
  extern const Table name;               \
  }
