// The row-wise part of the expert networks' backward: the derivative of the activation, with the gate's gradient.
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
};

using ExpertTable = TypedTable<ExpertFunctions>;
GLAM_PER_ISA_TABLE(ExpertTable, expert_table)

template <class T>
const ExpertFunctions<T>& expert_functions() {
  return functions_for<T>(active_expert_table());
}

}  // namespace glam::cpu
