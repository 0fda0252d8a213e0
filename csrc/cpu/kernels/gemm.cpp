// The product core in float and double; gemm.h says what it computes and why its bits are stable.
#include "cpu/kernels/gemm_functions.h"

namespace glam::cpu::GLAM_ISA {

extern const GemmTable gemm_table = {GemmEntries<FullPrecision<float>>::functions(),
                                     GemmEntries<FullPrecision<double>>::functions()};

}  // namespace glam::cpu::GLAM_ISA
