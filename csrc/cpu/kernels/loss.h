// The row-wise parts of the cross entropy over one block of logits: running statistics forward, logit gradients backward.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

// values[rows][stride] holds <hidden[row + i], embedding[column + j]> for j < columns; it is overwritten.
template <class T>
struct LogitBlock {
  T* values;
  int64_t stride;
  int64_t row;
  int64_t rows;
  int64_t column;  // in the whole vocabulary
  int64_t columns;
  T scale;
  T logit_cap;             // 0: none
  const int64_t* targets;  // [T]
};

template <class T>
struct LossFunctions {
  // Of the block's rows: the maximum, sum of exp(logit - maximum) and sum of the block's logits, each [T]; and the
  // target's logit if it lies in the block. With `keep` the values become exp(logit - maximum) * slope, where slope is
  // d logit / d (scale * product): with the row's factors that is the gradient.
  void (*reduce)(const LogitBlock<T>& block, bool keep, T* maximum, T* exp_sum, T* logit_sum, T* target_logit);
  // values <- d loss / d (the product), given d loss / d nll-like factors per token:
  //   row_softmax[t] * exp(logit - lse[t]) - row_target[t] [v = target] - row_uniform[t].
  void (*differentiate)(const LogitBlock<T>& block, const T* lse, const T* row_softmax, const T* row_target,
                        const T* row_uniform);
  // out[i] <- factor * kept[i] - less, of values that reduce() left.
  void (*differentiate_kept)(const void* kept, Type type, int64_t count, T factor, T less, T* out);
};

using LossTable = TypedTable<LossFunctions>;
GLAM_PER_ISA_TABLE(LossTable, loss_table)

template <class T>
const LossFunctions<T>& loss_functions() {
  return functions_for<T>(active_loss_table());
}

}  // namespace glam::cpu
