// Cross entropy of a linear output layer, without the logits: a block of them exists at a time, never [T, V].
//
//   logit[t, v] = cap(scale * <hidden[t], embedding[v]>),  cap(l) = c tanh(l / c) for logit_cap c > 0, else l
//   lse[t] = log sum_v exp(logit[t, v]),  nll[t] = lse[t] - logit[t, target[t]]
//   loss_sum = sum_t weights[t] * ((1 - s) nll[t] + s * (lse[t] - mean_v logit[t, v]) + z_loss * lse[t]^2)
//
// with s the label smoothing. Letters: T tokens, D model dim, V vocabulary. hidden [T, D]; embedding [V, D] float32 or
// hidden's dtype; targets int64 [T]; weights [T]; results float32 (float64 for float64). A vocabulary split over the
// ranks of `group` passes its first row as vocab_start: the statistics, then the gradient of hidden, are summed over the
// group. Only loss_sum is differentiable. embedding.t() may be packed for inference (ops/packed_weight.h) where no gradient
// is wanted.
//
// Where a gradient will be wanted, the forward pass computes it for a gradient of 1 at loss_sum, while it has the logits of
// a block of tokens (three products in all), and the backward pass scales it. A vocabulary split over ranks, or too large
// for the logits of a useful number of tokens, is multiplied once more in the backward pass instead.
// Sources: softmax z-loss of lingvo's gshard_builder.py and praxis' embedding_softmax.py; label smoothing spreads s
// evenly over the vocabulary as in arXiv 1512.00567.

#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>

#include "distributed/collectives.h"
#include "glam/ops.h"
#include "ops/accumulate.h"
#include "ops/checks.h"
#include "ops/packed_weight.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::linear_cross_entropy";

using Triple = std::tuple<Tensor, Tensor, Tensor>;
using LossSignature = Triple(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, double, double,
                             double, SymInt, c10::string_view);
using StatisticsSignature = Triple(const Tensor&, const Tensor&, const Tensor&, double, double, SymInt, SymInt);
using SumSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                                double, double, SymInt);
using WithGradientsSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                                  const Tensor&, const OptionalTensor&,
                                                                                  double, double, double, double, bool,
                                                                                  bool);
using ScaleSignature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                  const Tensor&, const Tensor&, at::ScalarType);
using BackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                     const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                                     const Tensor&, double, double, double, double, SymInt, SymInt);

const auto& statistics_op() {
  static const auto op = find_op<StatisticsSignature>("glam::_vocabulary_statistics");
  return op;
}
const auto& sum_op() {
  static const auto op = find_op<SumSignature>("glam::_cross_entropy_sum");
  return op;
}
const auto& backward_op() {
  static const auto op = find_op<BackwardSignature>("glam::_linear_cross_entropy_backward");
  return op;
}
const auto& with_gradients_op() {
  static const auto op = find_op<WithGradientsSignature>("glam::_linear_cross_entropy_with_gradients");
  return op;
}
const auto& scale_op() {
  static const auto op = find_op<ScaleSignature>("glam::_scale_loss_gradients");
  return op;
}

// Above it, 128 MiB of float32 logits would hold fewer than 256 tokens, and each block of tokens reads the whole embedding.
constexpr int64_t kMostOnePassVocabulary = 128 << 10;

struct Options {
  double scale, z_loss, label_smoothing, logit_cap;
  SymInt vocab_start;
  std::string group;
};

void check(const Tensor& hidden, const Tensor& embedding, const Tensor& targets, const OptionalTensor& weights,
           const Options& options) {
  check_floating(kOp, "hidden", hidden);
  check_dim(kOp, "hidden", hidden, "[T, D]", 2);
  if (packed::is_packed(embedding, 2)) {
    packed::check_weight(kOp, "embedding", embedding, "[D, V]", {hidden.sym_size(1), -1}, hidden);
  } else {
    check_shape(kOp, "embedding", embedding, "[V, D]", {-1, hidden.sym_size(1)});
    check_weight_dtype(kOp, "embedding", embedding, hidden);
  }
  check_dtype(kOp, "targets", targets, at::kLong);
  check_shape(kOp, "targets", targets, "[T]", {hidden.sym_size(0)});
  check_same_device(kOp, embedding, hidden);
  check_same_device(kOp, targets, hidden);
  if (weights) {
    check_dtype(kOp, "weights", *weights, accumulation_dtype(hidden.scalar_type()));
    check_shape(kOp, "weights", *weights, "[T]", {hidden.sym_size(0)});
    check_same_device(kOp, *weights, hidden);
  }
  TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing < 1, kOp,
              ": expected label_smoothing in [0, 1), got ", options.label_smoothing);
  TORCH_CHECK(options.logit_cap >= 0, kOp, ": expected logit_cap >= 0 (0: none), got ", options.logit_cap);
}

struct Forward {
  Tensor loss_sum, nll, lse;
};

Forward compute(const Tensor& hidden, const Tensor& embedding, const Tensor& targets, const OptionalTensor& weights,
                const Options& options) {
  const SymInt vocabulary = packed::table_rows(embedding) * collectives::group_size(options.group);
  auto [lse, target_logit, logit_sum] = statistics_op().call(hidden, embedding, targets, options.scale,
                                                             options.logit_cap, options.vocab_start, vocabulary);
  if (!options.group.empty()) {
    const Tensor largest = collectives::all_reduce(lse, "max", options.group);
    lse = at::log(collectives::all_reduce(at::exp(lse.sub(largest)), "sum", options.group)).add(largest);
    target_logit = collectives::all_reduce(target_logit, "sum", options.group);
    logit_sum = collectives::all_reduce(logit_sum, "sum", options.group);
  }
  auto [loss_sum, nll] =
      sum_op().call(lse, target_logit, logit_sum, weights, options.z_loss, options.label_smoothing, vocabulary);
  return {loss_sum, nll, lse};
}

// The gradients for a gradient of 1 at loss_sum are saved.
struct OnePassLoss : torch::autograd::Function<OnePassLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& embedding,
                               const Tensor& targets, const OptionalTensor& weights, const Options& options,
                               bool needs_hidden, bool needs_embedding) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss_sum, nll, lse, grad_hidden, grad_embedding] =
        with_gradients_op().call(hidden, embedding, targets, weights, options.scale, options.z_loss,
                                 options.label_smoothing, options.logit_cap, needs_hidden, needs_embedding);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_hidden, grad_embedding});
    ctx->saved_data["embedding"] = embedding;  // for who it is
    ctx->saved_data["dtype"] = static_cast<int64_t>(hidden.scalar_type());
    return {loss_sum, nll, lse};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& saved_embedding = saved[1];
    const Tensor grad_loss = grads[0].defined() ? grads[0] : saved_embedding.new_zeros({}, saved[0].options());
    // Where it is not used again, the larger one becomes the result.
    const bool in_place = !torch::autograd::get_current_graph_task_keep_graph() && !at::GradMode::is_enabled();
    auto [grad_hidden, grad_embedding] = scale_op().call(grad_loss, optional(grads[1]), optional(grads[2]), saved[0],
                                                         in_place ? saved_embedding.new_empty({0}) : saved_embedding,
                                                         static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()));
    if (in_place) grad_embedding = saved_embedding.mul_(grad_loss);
    if (ctx->needs_input_grad(1)) {
      accumulate::announce(ctx->saved_data["embedding"].toTensor(), grad_embedding);
    }
    return {ctx->needs_input_grad(0) ? grad_hidden : Tensor(),
            ctx->needs_input_grad(1) ? grad_embedding : Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

struct TwoPassLoss : torch::autograd::Function<TwoPassLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& embedding,
                               const Tensor& targets, const OptionalTensor& weights, const Options& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Forward result = compute(hidden, embedding, targets, weights, options);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({hidden, embedding, targets, weights.value_or(Tensor()), result.lse});
    ctx->saved_data["scale"] = options.scale;
    ctx->saved_data["z_loss"] = options.z_loss;
    ctx->saved_data["label_smoothing"] = options.label_smoothing;
    ctx->saved_data["logit_cap"] = options.logit_cap;
    ctx->saved_data["vocab_start"] = options.vocab_start;
    ctx->saved_data["group"] = options.group;
    return {result.loss_sum, result.nll, result.lse};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const std::string group = data["group"].toStringRef();
    const Tensor grad_loss = grads[0].defined() ? grads[0] : saved[4].new_zeros({});
    auto [grad_hidden, grad_embedding] =
        backward_op().call(grad_loss, optional(grads[1]), optional(grads[2]), saved[0], saved[1], saved[2],
                           optional(saved[3]), saved[4], data["scale"].toDouble(), data["z_loss"].toDouble(),
                           data["label_smoothing"].toDouble(), data["logit_cap"].toDouble(),
                           data["vocab_start"].toSymInt(), saved[1].sym_size(0) * collectives::group_size(group));
    if (!group.empty()) grad_hidden = collectives::all_reduce(grad_hidden, "sum", group);
    if (ctx->needs_input_grad(1)) accumulate::announce(saved[1], grad_embedding);
    return {ctx->needs_input_grad(0) ? grad_hidden : Tensor(), ctx->needs_input_grad(1) ? grad_embedding : Tensor(),
            Tensor(), Tensor(), Tensor()};
  }
};

Triple loss_autograd(const Tensor& hidden, const Tensor& embedding, const Tensor& targets,
                     const OptionalTensor& weights, double scale, double z_loss, double label_smoothing,
                     double logit_cap, SymInt vocab_start, c10::string_view group) {
  const Options options{scale, z_loss, label_smoothing, logit_cap, std::move(vocab_start), std::string(group)};
  check(hidden, embedding, targets, weights, options);
  if (packed::is_packed(embedding, 2)) {
    packed::refuse_gradients(kOp, {hidden, embedding});
    at::AutoDispatchBelowADInplaceOrView guard;
    const Forward result = compute(hidden, embedding, targets, weights, options);
    return {result.loss_sum, result.nll, result.lse};
  }
  const bool one_pass = options.group.empty() && options.vocab_start == 0 &&
                        embedding.sym_size(0) <= kMostOnePassVocabulary && at::GradMode::is_enabled() &&
                        (hidden.requires_grad() || embedding.requires_grad());
  const auto outputs = one_pass ? OnePassLoss::apply(hidden, embedding, targets, weights, options,
                                                     hidden.requires_grad(), embedding.requires_grad())
                                : TwoPassLoss::apply(hidden, embedding, targets, weights, options);
  return {outputs[0], outputs[1], outputs[2]};
}
Triple loss_below_autograd(const Tensor& hidden, const Tensor& embedding, const Tensor& targets,
                           const OptionalTensor& weights, double scale, double z_loss, double label_smoothing,
                           double logit_cap, SymInt vocab_start, c10::string_view group) {
  const Options options{scale, z_loss, label_smoothing, logit_cap, std::move(vocab_start), std::string(group)};
  check(hidden, embedding, targets, weights, options);
  const Forward result = compute(hidden, embedding, targets, weights, options);
  return {result.loss_sum, result.nll, result.lse};
}

Tensor per_token(const Tensor& hidden) {
  return at::empty_symint({hidden.sym_size(0)}, hidden.options().dtype(accumulation_dtype(hidden.scalar_type())));
}
Triple statistics_meta(const Tensor& hidden, const Tensor&, const Tensor&, double, double, SymInt, SymInt) {
  return {per_token(hidden), per_token(hidden), per_token(hidden)};
}
std::tuple<Tensor, Tensor> sum_meta(const Tensor& lse, const Tensor&, const Tensor&, const OptionalTensor&, double,
                                    double, SymInt) {
  return {at::empty({}, lse.options()), at::empty_symint(lse.sym_sizes(), lse.options())};
}
std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                         const Tensor& hidden, const Tensor& embedding, const Tensor&,
                                         const OptionalTensor&, const Tensor&, double, double, double, double, SymInt,
                                         SymInt) {
  return {at::empty_symint(hidden.sym_sizes(), hidden.options()),
          at::empty_symint(embedding.sym_sizes(), embedding.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_gradients_meta(const Tensor& hidden, const Tensor& embedding,
                                                                       const Tensor&, const OptionalTensor&, double,
                                                                       double, double, double, bool needs_hidden,
                                                                       bool needs_embedding) {
  const auto like = [](const Tensor& x, bool needed, at::TensorOptions options) {
    return needed ? at::empty_symint(x.sym_sizes(), options) : at::empty({0}, options);
  };
  const Tensor lse = per_token(hidden);
  return {at::empty({}, lse.options()), per_token(hidden), lse, like(hidden, needs_hidden, lse.options()),
          like(embedding, needs_embedding, embedding.options())};
}
std::tuple<Tensor, Tensor> scale_gradients(const Tensor& grad_loss, const OptionalTensor& grad_nll,
                                           const OptionalTensor& grad_lse, const Tensor& hidden,
                                           const Tensor& embedding, at::ScalarType dtype) {
  checks::linear_cross_entropy_backward(grad_nll, grad_lse);
  return {hidden.mul(grad_loss).to(dtype), embedding.mul(grad_loss)};
}
std::tuple<Tensor, Tensor> scale_meta(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor& hidden,
                                      const Tensor& embedding, at::ScalarType dtype) {
  return {at::empty_symint(hidden.sym_sizes(), hidden.options().dtype(dtype)),
          at::empty_symint(embedding.sym_sizes(), embedding.options())};
}

}  // namespace

void checks::linear_cross_entropy_backward(const OptionalTensor& grad_nll, const OptionalTensor& grad_lse) {
  for (const auto& [name, grad] : {std::pair("nll", grad_nll), std::pair("lse", grad_lse)}) {
    TORCH_CHECK(!grad || !grad->any().item<bool>(), kOp, ": expected gradients only at loss_sum, got one at ", name,
                " (detach it before it enters a loss)");
  }
}

Triple linear_cross_entropy(const Tensor& hidden, const Tensor& embedding, const Tensor& targets,
                            const OptionalTensor& weights, double scale, double z_loss, double label_smoothing,
                            double logit_cap, SymInt vocab_start, std::string_view group) {
  static const auto op = find_op<LossSignature>(kOp);
  return op.call(hidden, embedding, targets, weights, scale, z_loss, label_smoothing, logit_cap, std::move(vocab_start),
                 group);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor embedding, Tensor targets, Tensor? weights, float scale=1., "
      "float z_loss=0., float label_smoothing=0., float logit_cap=0., SymInt vocab_start=0, str group=\"\") -> "
      "(Tensor loss_sum, Tensor nll, Tensor lse)",
      tags);
  // Over the vocabulary rows held here; target_logit is 0 where the target is held elsewhere.
  m.def(
      "_vocabulary_statistics(Tensor hidden, Tensor embedding, Tensor targets, float scale, float logit_cap, "
      "SymInt vocab_start, SymInt vocabulary) -> (Tensor lse, Tensor target_logit, Tensor logit_sum)",
      tags);
  m.def(
      "_cross_entropy_sum(Tensor lse, Tensor target_logit, Tensor logit_sum, Tensor? weights, float z_loss, "
      "float label_smoothing, SymInt vocabulary) -> (Tensor loss_sum, Tensor nll)",
      tags);
  // The gradients are those of loss_sum, hidden's in the accumulation dtype; empty where they are not needed.
  m.def(
      "_linear_cross_entropy_with_gradients(Tensor hidden, Tensor embedding, Tensor targets, Tensor? weights, "
      "float scale, float z_loss, float label_smoothing, float logit_cap, bool needs_hidden, bool needs_embedding) -> "
      "(Tensor loss_sum, Tensor nll, Tensor lse, Tensor grad_hidden, Tensor grad_embedding)",
      tags);
  m.def(
      "_scale_loss_gradients(Tensor grad_loss, Tensor? grad_nll, Tensor? grad_lse, Tensor grad_hidden, "
      "Tensor grad_embedding, ScalarType dtype) -> (Tensor hidden, Tensor embedding)",
      tags);
  m.def(
      "_linear_cross_entropy_backward(Tensor grad_loss, Tensor? grad_nll, Tensor? grad_lse, Tensor hidden, "
      "Tensor embedding, Tensor targets, Tensor? weights, Tensor lse, float scale, float z_loss, "
      "float label_smoothing, float logit_cap, SymInt vocab_start, SymInt vocabulary) -> "
      "(Tensor hidden, Tensor embedding)",
      tags);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("linear_cross_entropy", loss_autograd);
  for (const char* name : {"_vocabulary_statistics", "_cross_entropy_sum", "_linear_cross_entropy_with_gradients",
                           "_scale_loss_gradients", "_linear_cross_entropy_backward"}) {
    m.impl(name, refuse_double_backward());
  }
}
TORCH_LIBRARY_IMPL(glam, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy", loss_below_autograd);
  m.impl("_scale_loss_gradients", scale_gradients);
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("_vocabulary_statistics", statistics_meta);
  m.impl("_cross_entropy_sum", sum_meta);
  m.impl("_linear_cross_entropy_with_gradients", with_gradients_meta);
  m.impl("_scale_loss_gradients", scale_meta);
  m.impl("_linear_cross_entropy_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) { m.impl("linear_cross_entropy", autocast_leading_arguments<1>()); }
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) { m.impl("linear_cross_entropy", autocast_leading_arguments<1>()); }

}  // namespace glam
