// The experts' networks for the ops that are built on them: the private ops of ops/experts.cpp, which no autograd records.
#pragma once

#include "ops/common.h"

namespace glam::experts {

// Gradients of wi, wo and wg, contiguous; that of wg is empty where there is no wg.
struct WeightGradients {
  Tensor wi, wo, wg;

  bool add = false;  // to what the tensors hold; otherwise they are overwritten

  static WeightGradients empty(const Tensor& wi, const Tensor& wo, const OptionalTensor& wg);
  // To add to while an AccumulateInPlace lives (ops/accumulate.h): the leaves' own.
  static std::optional<WeightGradients> taken_from(const Tensor& wi, const Tensor& wo, const OptionalTensor& wg);
};

// out, pre, pre_gate.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& rows, const OptionalTensor& offsets, const Tensor& wi,
                                           const Tensor& wo, const OptionalTensor& wg, c10::string_view activation);

// The backward pass in two steps: first what other ranks wait for, then what this one keeps.
//
// The gradients of rows, pre and pre_gate.
std::tuple<Tensor, Tensor, Tensor> backward_rows(const Tensor& grad, const OptionalTensor& offsets, const Tensor& pre,
                                                 const Tensor& pre_gate, const Tensor& wi, const Tensor& wo,
                                                 const OptionalTensor& wg, c10::string_view activation);
// Fills `gradients`, which may be slices of larger tensors.
void backward_weights(const Tensor& grad, const Tensor& rows, const OptionalTensor& offsets, const Tensor& pre,
                      const Tensor& pre_gate, const Tensor& grad_pre, const Tensor& grad_pre_gate,
                      c10::string_view activation, const WeightGradients& gradients);

}  // namespace glam::experts
