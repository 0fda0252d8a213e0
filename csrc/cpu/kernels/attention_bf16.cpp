// Attention on bfloat16 rows: also compiled for sets whose only addition is an instruction for their products.
#include "cpu/kernels/attention_head.h"

namespace glam::cpu::GLAM_ISA {

extern const Bf16AttentionTable bf16_attention_table = HeadKernels<float, Bf16Precision>::functions();

}  // namespace glam::cpu::GLAM_ISA
