// Argument checks that an op's Autograd, Meta and device kernels share, one per op and named after it. Each raises
// `glam::op: expected ..., got ...`. Defined in the op's own file.
#pragma once

#include "ops/common.h"

namespace glam::checks {

void linear(const Tensor& x, const Tensor& weight);
// The three tensors of a routing plan for num_tokens tokens.
void plan(const char* op, const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets,
          const SymInt& num_tokens);
void expert_mlp(const char* op, const Tensor& rows, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                const OptionalTensor& wg, c10::string_view activation);
void moe_mlp(const Tensor& x, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
             const Tensor& offsets, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
             c10::string_view activation);
void router_logits(const Tensor& x, const Tensor& weight);
void rms_norm(const Tensor& x, const Tensor& scale);
void embedding(const Tensor& ids, const Tensor& table);
// nll and lse have no gradient. One that arrives all the same is looked at, which waits for its device.
void linear_cross_entropy_backward(const OptionalTensor& grad_nll, const OptionalTensor& grad_lse);
void relative_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                        const OptionalTensor& segment_ids, double logit_cap);
void relative_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                             const Tensor& v_cache, const Tensor& positions, const Tensor& bias, double logit_cap);
void reorder_cache(const Tensor& cache, const Tensor& beams);
void sample_logits(const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k, double top_p);
void counter_uniform(const Tensor& index);
// num_rows, num_cols and num_elements are the lengths of those lists.
void adafactor_sums(at::TensorList grads, at::TensorList weights, const std::vector<bool>& factored);
void adafactor_stats(at::TensorList row_vars, at::TensorList col_vars, at::TensorList grads, const Tensor& row_sums,
                     const Tensor& col_sums, const Tensor& step, const OptionalTensor& skip, size_t num_rows,
                     size_t num_cols);
void adafactor_update_squares(const Tensor& row_means, const Tensor& scaled_squares, c10::SymIntArrayRef num_matrices);
void adafactor_apply(at::TensorList weights, at::TensorList grads, at::TensorList row_vars, at::TensorList col_vars,
                     const Tensor& row_means, const Tensor& weight_squares, const Tensor& update_squares,
                     const Tensor& lr, const OptionalTensor& skip, size_t num_elements);
void squared_norm(at::TensorList xs);

}  // namespace glam::checks
