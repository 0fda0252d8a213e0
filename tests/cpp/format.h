// What the programs about one format (GLAM_FORMAT) of the kernels share.
#pragma once

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <type_traits>

#include "cpu/kernels/pack.h"

namespace kernels = glam::cpu::GLAM_ISA;

template <class T>
using FullPrecision = kernels::FullPrecision<T>;
using kernels::Bf16Precision;
using Format = GLAM_FORMAT;
using Sum = Format::Sum;
inline constexpr bool kIsBf16 = std::is_same_v<Format, Bf16Precision>;

// As csrc/cpu/isa.cpp; nothing without AMX.
inline void ask_for_tiles() {
#if defined(__AMX_BF16__)
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
}
