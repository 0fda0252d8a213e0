#include "cpu/kernels/attention_head.h"

namespace glam::cpu::GLAM_ISA {

extern const AttentionTable attention_table = {HeadKernels<float, FullPrecision<float>>::functions(),
                                               HeadKernels<double, FullPrecision<double>>::functions()};

}  // namespace glam::cpu::GLAM_ISA
