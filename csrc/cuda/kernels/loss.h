// Row-wise parts of the cross entropy over a block of logits: statistics forward, gradients of the logits backward, and
// the sum over tokens. The formulas are those of ops/loss.cpp.
//
// S is the accumulation type: float64 for Type::f64, else float32. Arrays of S that have a value per token are [rows].
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

// Rows of a LogitBlock start this many elements apart, or a multiple of it, so that each is made of whole vectors.
constexpr int64_t kLogitPadding = 8;

// products[rows][stride], S: <hidden[row], embedding[column]> for column < columns, on a boundary of 16 bytes. What
// lies between columns and stride may hold anything.
struct LogitBlock {
  const void* products;
  Type type;  // of hidden
  int64_t rows, columns, stride;
  int64_t first_column;     // in the whole vocabulary
  int64_t vocabulary;       // whole
  const int64_t* targets;   // [rows]; one outside [0, vocabulary): logit and gradient NaN
  double scale, logit_cap;  // logit_cap 0: none
};

// lse, target_logit (0 where the target is in another block) and logit_sum, S. With `first` they are written, else the
// columns are added to those that they stand for.
void loss_statistics(const LogitBlock& block, bool first, void* lse, void* target_logit, void* logit_sum,
                     cudaStream_t stream);

// gradient[rows][stride], block.type: d loss_sum / d product, given lse (S) and weights (S; null: ones). A row of
// weight 0 is zeros whatever its products are. `gradient` may be `products` where the types have one size.
void loss_gradient(const LogitBlock& block, const void* lse, const void* weights, double z_loss, double label_smoothing,
                   void* gradient, cudaStream_t stream);

// nll [T] and loss_sum [], S, from statistics [T] over the whole vocabulary; type is f32 or f64, weights may be null.
// `partial` is float64 [loss_sum_blocks(T)].
int64_t loss_sum_blocks(int64_t T);
void loss_sum(const void* lse, const void* target_logit, const void* logit_sum, const void* weights, Type type,
              double z_loss, double label_smoothing, int64_t vocabulary, int64_t T, void* nll, double* partial,
              void* loss_sum, cudaStream_t stream);

}  // namespace glam::cuda
