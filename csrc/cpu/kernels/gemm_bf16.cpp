// The product core in bfloat16: also compiled for sets whose only addition is an instruction for it.
#include "cpu/kernels/gemm_functions.h"

namespace glam::cpu::GLAM_ISA {

extern const Bf16GemmTable bf16_gemm_table = GemmEntries<Bf16Precision>::functions();

}  // namespace glam::cpu::GLAM_ISA
