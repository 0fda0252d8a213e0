// top2_gating on CUDA tensors (kernels/gating.h).

#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <string_view>

#include "cuda/common.h"
#include "cuda/kernels/gating.h"
#include "ops/routing.h"

namespace glam::cuda {
namespace {

constexpr auto kOp = "glam::top2_gating";
constexpr auto kBackwardOp = "glam::_top2_gating_backward";

// For GLAM_DEBUG_NONFINITE=1 alone: it waits for the device.
void check_finite(const Tensor& logits, const OptionalTensor& mask) {
  Tensor bad = at::isfinite(logits).all(1).logical_not();
  if (mask) bad = bad.logical_and(*mask);
  if (!bad.any().item<bool>()) return;
  TORCH_CHECK(false, kOp, ": expected logits to be finite (GLAM_DEBUG_NONFINITE=1), got a NaN or an infinity in token ",
              bad.to(at::kByte).argmax().item<int64_t>());
}

GatingProblem problem_of(const char* op, const Tensor& logits, int64_t group_size) {
  const int64_t T = logits.size(0), E = logits.size(1);
  TORCH_CHECK(T <= std::numeric_limits<int32_t>::max() / 2, op, ": expected T to be below 2^30, got ", T);
  TORCH_CHECK(E <= kMostGatedExperts, op, ": expected at most ", kMostGatedExperts, " experts on CUDA, got ", E);
  const int64_t G = checks::num_groups(op, T, group_size).expect_int();
  return {.T = T, .E = E, .G = G, .group_size = group_size == -1 ? T : group_size};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gating(const Tensor& logits_, const OptionalTensor& token_mask,
                                                  const OptionalTensor& noise_, int64_t group_size, int64_t capacity,
                                                  c10::string_view second_policy, double second_threshold,
                                                  bool normalize_before_capacity) {
  checks::top2_gating(logits_, token_mask, noise_, capacity, second_policy, second_threshold);
  GatingProblem problem = problem_of(kOp, logits_, group_size);
  problem.capacity = capacity;
  const auto policy = checks::second_policy(kOp, second_policy);
  problem.second = policy == SecondPolicy::all      ? SecondChoice::all
                   : policy == SecondPolicy::random ? SecondChoice::random
                                                    : SecondChoice::sampling;
  problem.second_threshold = second_threshold;
  problem.normalize_before_capacity = normalize_before_capacity;
  if (checks::raise_on_nonfinite()) check_finite(logits_, token_mask);

  const Tensor logits = logits_.contiguous(), mask = token_mask ? token_mask->contiguous() : Tensor();
  const Tensor noise = noise_ ? noise_->contiguous() : Tensor();
  const OnDevice device(logits);
  const int64_t T = problem.T, E = problem.E, G = problem.G;
  const auto options = logits.options().dtype(accumulation_dtype(logits.scalar_type()));
  if (problem.chunks() == 0) {  // one group of no token has an aux_loss too
    return {at::empty({T, 2}, options), at::empty({T, 2}, options.dtype(at::kInt)),
            at::empty({T, 2}, options.dtype(at::kInt)), at::zeros({G}, options)};
  }
  const Tensor gates = at::empty({T, 2}, options), aux = at::empty({G}, options);
  const Tensor ids = at::empty({T, 2}, options.dtype(at::kInt)), positions = at::empty({T, 2}, ids.options());
  const Tensor p_sums = at::empty({problem.chunks(), E}, options.dtype(at::kDouble));
  const Tensor aux_parts = at::empty({G, (E + 31) / 32}, p_sums.options());
  const Tensor counts = at::empty({2, problem.chunks(), E}, ids.options());
  auto* const first_counts = counts.mutable_data_ptr<int32_t>();
  top2_gating(problem, data(logits), type_of(logits), static_cast<const bool*>(data(mask)), data(noise),
              noise.defined() && noise.scalar_type() == at::kDouble,
              {.p_sums = p_sums.mutable_data_ptr<double>(),
               .first_counts = first_counts,
               .second_counts = first_counts + problem.chunks() * E,
               .aux_parts = aux_parts.mutable_data_ptr<double>()},
              mutable_data(gates), ids.mutable_data_ptr<int32_t>(), positions.mutable_data_ptr<int32_t>(),
              mutable_data(aux), device.stream());
  return {gates, ids, positions, aux};
}

Tensor gating_backward(const OptionalTensor& grad_gates_, const OptionalTensor& grad_aux_, const Tensor& logits_,
                       const Tensor& expert_ids, const Tensor& positions_, int64_t group_size,
                       bool normalize_before_capacity) {
  GatingProblem problem = problem_of(kBackwardOp, logits_, group_size);
  problem.normalize_before_capacity = normalize_before_capacity;
  checks::top2_gating_backward(grad_gates_, grad_aux_, logits_, expert_ids, positions_, problem.G);
  const Tensor logits = logits_.contiguous(), ids = expert_ids.contiguous(), positions = positions_.contiguous();
  const Tensor grad_gates = grad_gates_ ? grad_gates_->contiguous() : Tensor();
  const Tensor grad_aux = grad_aux_ ? grad_aux_->contiguous() : Tensor();
  const OnDevice device(logits);
  const Tensor counts = at::zeros({grad_aux.defined() ? problem.G : 0, problem.E}, ids.options());
  Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  top2_gating_backward(problem, data(grad_gates), data(grad_aux), data(logits), type_of(logits), indices(ids),
                       indices(positions), counts.mutable_data_ptr<int32_t>(), mutable_data(grad_logits),
                       device.stream());
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("top2_gating", gating);
  m.impl("_top2_gating_backward", gating_backward);
}

}  // namespace glam::cuda
