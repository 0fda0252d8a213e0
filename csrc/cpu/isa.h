// Which instruction set the CPU kernels use.
//
// Every file of csrc/cpu/kernels is compiled once per instruction set, each copy in its own namespace glam::cpu::<name>
// (avx512bf16 and amx are avx512 but for bfloat16 products).
// The set is chosen once per process: the widest that both this build and this CPU have, unless the environment variable
// GLAM_CPU_ISA (baseline, avx2, avx512, avx512bf16 or amx) asks for another; asking for one that is absent is an error,
// never a fallback.
#pragma once

#include <string>
#include <vector>

namespace glam {

enum class Isa { baseline, avx2, avx512, avx512bf16, amx };

// The set in use; throws c10::Error if GLAM_CPU_ISA names an unknown or unavailable one.
Isa active_isa();

// The name by which GLAM_CPU_ISA knows it.
std::string isa_name(Isa isa);

// Names of the sets this build contains, and of those this CPU can run, narrowest first.
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

}  // namespace glam
