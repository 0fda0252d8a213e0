// Causal attention of one (sequence, head), forward and backward, over blocks of queries.
//
// A block keeps its scores transposed, [keys][queries], in the caller's scratch: everything is vectorised across queries
// while keys are walked one after the other, and the scores are at once a packed panel for the product with v. The forward
// pass reads them twice, the backward pass makes them again, a few keys at a time, from the saved log of the sum.
// bfloat16 rows are multiplied in bfloat16: probabilities, before they are divided by their sum, and the scores' gradients
// are rounded to it.
// A query's bits depend on its own row and the keys it attends to: masked keys add exactly nothing, wherever they are.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

// Zeros that the bias line needs on either side: the queries of the widest block.
inline constexpr int64_t kLinePadding = 32;

template <class T>
struct AttentionHead {
  // Row i of q is the query at position query_position + i; row j of k and v is the key at position j.
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  Type type = Type::f32;
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements between rows
  int64_t A = 0;
  int64_t query_position = 0;
  const T* line = nullptr;            // bias by distance, kLinePadding zeros before and after
  const int32_t* segments = nullptr;  // by position; 0: padding. Null: one segment.
  bool extra_logit = true;
  T logit_cap = 0;  // 0: none
};

template <class T>
struct AttentionGradients {
  const void* grad_out = nullptr;  // rows as q's
  const T* lse = nullptr;          // by query row
  int64_t grad_out_stride = 0;
  int64_t out_stride = 0;  // of grad_q, grad_k, grad_v
  void* grad_q = nullptr;
  void* grad_k = nullptr;
  void* grad_v = nullptr;
  T* grad_line = nullptr;  // as line; added to
};

template <class T>
struct AttentionFunctions {
  // Query rows [begin, end): out rows of A elements out_stride apart, in q's type, and their log of the sum of exp
  // (infinity where nothing is attended to) if lse is not null. out and lse start at row `begin`.
  void (*forward)(const AttentionHead<T>& head, int64_t begin, int64_t end, void* out, int64_t out_stride, T* lse,
                  char* scratch);
  // All queries [0, S), query_position 0.
  void (*backward)(const AttentionHead<T>& head, int64_t S, const AttentionGradients<T>& gradients, char* scratch);
  // Bytes of scratch for num_keys keys.
  int64_t (*forward_scratch)(int64_t num_keys, int64_t A);
  int64_t (*backward_scratch)(int64_t num_keys, int64_t A);
  int64_t queries_per_block;
};

using AttentionTable = TypedTable<AttentionFunctions>;
using Bf16AttentionTable = AttentionFunctions<float>;
GLAM_PER_ISA_TABLE(AttentionTable, attention_table)
GLAM_PER_ISA_TABLE_WITH_BF16(Bf16AttentionTable, bf16_attention_table)

// For rows of `type`; T is its accumulation type.
template <class T>
const AttentionFunctions<T>& attention_functions(Type type) {
  if constexpr (std::is_same_v<T, float>) {
    if (type == Type::bf16) return active_bf16_attention_table();
  }
  return functions_for<T>(active_attention_table());
}

}  // namespace glam::cpu
