// What the gating and routing ops demand of their arguments, shared by Autograd, Meta and device kernels. Each check
// raises `glam::op: expected ..., got ...`. Defined in ops/gating.cpp and ops/routing.cpp.
#pragma once

#include "ops/checks.h"

namespace glam {

// How the second expert of a token is chosen; the names of the `second_policy` argument.
enum class SecondPolicy { all, random, sampling };

namespace checks {

// Number of routing groups: T / group_size, or one group (even of no token) for group_size -1.
SymInt num_groups(const char* op, const SymInt& num_tokens, const SymInt& group_size);

SecondPolicy second_policy(const char* op, std::string_view name);

// GLAM_DEBUG_NONFINITE=1: a logit that is not finite is an error instead of a NaN in the gates.
bool raise_on_nonfinite();

void top2_gating(const Tensor& logits, const OptionalTensor& token_mask, const OptionalTensor& noise,
                 const SymInt& capacity, std::string_view policy, double second_threshold);
void top2_gating_backward(const OptionalTensor& grad_gates, const OptionalTensor& grad_aux, const Tensor& logits,
                          const Tensor& expert_ids, const Tensor& positions, const SymInt& num_groups);

void routing_plan(const Tensor& expert_ids, const Tensor& positions, const SymInt& num_experts, const SymInt& slots);
void dispatch(const Tensor& x, const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets);
void dispatch_backward(const Tensor& grad_rows, const Tensor& row_of_choice, const Tensor& choice_of_row,
                       const Tensor& offsets);
void combine(const char* op, const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice,
             const Tensor& choice_of_row, const Tensor& offsets);
void combine_backward(const Tensor& grad_y, const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice,
                      const Tensor& choice_of_row, const Tensor& offsets);

}  // namespace checks
}  // namespace glam
