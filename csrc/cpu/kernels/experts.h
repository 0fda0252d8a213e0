// The row-wise parts of the expert networks: derivative of the activation with the gate's gradient, and the
// gather-and-sum that brings rows back to tokens.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

// Rows [0, rows) of one block of the backward. grad_hidden = dy Wo^T before the gate is applied.
template <class T>
struct ExpertBackwardRows {
  Transform activation;
  const T* grad_hidden;  // [rows][grad_stride]
  int64_t grad_stride;
  int64_t rows;
  int64_t hidden_dim;
  Type type;  // of the four matrices below, each [rows][hidden_dim]
  const void* pre;
  const void* pre_gate;  // geglu only
  void* grad_pre;
  void* grad_pre_gate;  // geglu only
  const T* gates;       // [rows], or null: 1
  T* grad_gates;        // [rows], or null: <act(pre), grad_hidden>
};

template <class T>
struct ExpertFunctions {
  void (*backward_rows)(const ExpertBackwardRows<T>& block);
  // y[t] = sum over k of gates[t, k] * rows[row_of_choice[t, k]] for t in [begin, end), in order of k; gates null: 1.
  void (*combine)(const T* rows, int64_t dim, const int32_t* row_of_choice, int64_t num_choices, const T* gates,
                  int64_t begin, int64_t end, const Output& y);
};

using ExpertTable = TypedTable<ExpertFunctions>;
GLAM_PER_ISA_TABLE(ExpertTable, expert_table)

template <class T>
const ExpertFunctions<T>& expert_functions() {
  return functions_for<T>(active_expert_table());
}

}  // namespace glam::cpu
