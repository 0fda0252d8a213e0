// The router's product and its gradients. Its weight has few columns and x is read once: nothing of x is packed, its rows
// are only widened, so that reading x is most of the time. The bits are those of the product core in full precision.
//
// x is contiguous [tokens, D] of `type`; the weight is [D, E] and the logits' gradient [tokens, E] in the accumulation type.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

template <class T>
struct RouterFunctions {
  int64_t tile_tokens;
  int64_t tile_columns;
  // Elements of the panels of a [depth, columns] matrix, and the panels of one that is the B side of a product.
  int64_t (*panel_elements)(int64_t depth, int64_t columns);
  void (*pack)(const Operand& matrix, int64_t depth, int64_t columns, T* panels);
  // logits [tokens, E], with the weight's panels. scratch: panel_elements(tile_tokens, E).
  void (*logits)(const void* x, Type type, int64_t tokens, int64_t D, const T* panels, int64_t E, T* logits,
                 T* scratch);
  // grad_x [tokens, D] of `type`, with the panels of the weight [E, D] transposed. scratch: tile_tokens * E.
  void (*input_gradient)(const T* grad, int64_t tokens, int64_t E, const T* panels, int64_t D, void* grad_x, Type type,
                         T* scratch);
  // Rows [begin, end) of grad_weight [D, E]. scratch: tile_columns * E.
  void (*weight_gradient)(const void* x, Type type, int64_t tokens, int64_t D, const T* grad, int64_t E, int64_t begin,
                          int64_t end, T* grad_weight, T* scratch);
};

using RouterTable = TypedTable<RouterFunctions>;
GLAM_PER_ISA_TABLE(RouterTable, router_table)

template <class T>
const RouterFunctions<T>& router_functions() {
  return functions_for<T>(active_router_table());
}

}  // namespace glam::cpu
