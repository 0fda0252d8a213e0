// Attention with T5's bucketed relative bias: o[i] = sum over j <= i of p[i, j] v[j].
//
// q, k, v [B, S, H, A] give o [B, S, H, A] in their dtype; no 1/sqrt(A) (it belongs to the initialisation).
//   logit[i, j] = <q[i], k[j]> + bias[h, bucket(i - j)], then logit_cap * tanh(logit / logit_cap) if logit_cap > 0
//   p[i, j] = exp(logit[i, j]) / (extra_logit + sum over the j that i may see of exp(logit[i, j])); for bfloat16 the
//   numerators are rounded to it where they meet v
// Position i sees j <= i of the same segment; segment 0 is padding: it sees nothing, is not seen, its o is 0.
// Saved for the backward: q, k, v, bias, segment_ids and the log of each denominator [B, H, S]; never [S, S].
// Source: praxis attentions.py (relative bias, attention_extra_logit = 0), as the public GLaM builder sets it.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"
#include "ops/relative_buckets.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::relative_attention";

using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                    const OptionalTensor&, bool, double);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                     const Tensor&, const Tensor&,
                                                                     const OptionalTensor&, const Tensor&, bool,
                                                                     double);

const auto& forward_op() {
  static const auto op = find_op<ForwardSignature>("glam::_relative_attention_forward");
  return op;
}
const auto& backward_op() {
  static const auto op = find_op<BackwardSignature>("glam::_relative_attention_backward");
  return op;
}

}  // namespace

void checks::relative_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                const OptionalTensor& segment_ids, double logit_cap) {
  check_floating(kOp, "q", q);
  check_dim(kOp, "q", q, "[B, S, H, A]", 4);
  for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_same_dtype(kOp, name, *tensor, "q", q);
    check_shape(kOp, name, *tensor, "[B, S, H, A]", q.sym_sizes().vec());
    check_same_device(kOp, *tensor, q);
  }
  check_shape(kOp, "bias", bias, "[H, 32]", {q.sym_size(2), kNumBuckets});
  check_weight_dtype(kOp, "bias", bias, q);
  check_same_device(kOp, bias, q);
  if (segment_ids) {
    check_dtype(kOp, "segment_ids", *segment_ids, at::kInt);
    check_shape(kOp, "segment_ids", *segment_ids, "[B, S]", {q.sym_size(0), q.sym_size(1)});
    check_same_device(kOp, *segment_ids, q);
  }
  TORCH_CHECK(logit_cap >= 0, kOp, ": expected logit_cap >= 0 (0: none), got ", logit_cap);
}

namespace {

struct RelativeAttentionFunction : torch::autograd::Function<RelativeAttentionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                        const OptionalTensor& segment_ids, bool extra_logit, double logit_cap) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, lse] = forward_op().call(q, k, v, bias, segment_ids, extra_logit, logit_cap);
    ctx->save_for_backward({q, k, v, bias, segment_ids.value_or(Tensor()), lse});
    ctx->saved_data["extra_logit"] = extra_logit;
    ctx->saved_data["logit_cap"] = logit_cap;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor segment_ids = saved[4].defined() ? OptionalTensor(saved[4]) : std::nullopt;
    auto [grad_q, grad_k, grad_v, grad_bias] =
        backward_op().call(grads[0], saved[0], saved[1], saved[2], saved[3], segment_ids, saved[5],
                           ctx->saved_data["extra_logit"].toBool(), ctx->saved_data["logit_cap"].toDouble());
    variable_list result = {grad_q, grad_k, grad_v, grad_bias, Tensor(), Tensor(), Tensor()};
    for (size_t i = 0; i < 4; ++i) {
      if (!ctx->needs_input_grad(i)) result[i] = Tensor();
    }
    return result;
  }
};

Tensor attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                          const OptionalTensor& segment_ids, bool extra_logit, double logit_cap) {
  return RelativeAttentionFunction::apply(q, k, v, bias, segment_ids, extra_logit, logit_cap);
}
Tensor attention_below_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                const OptionalTensor& segment_ids, bool extra_logit, double logit_cap) {
  return std::get<0>(forward_op().call(q, k, v, bias, segment_ids, extra_logit, logit_cap));
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                        const OptionalTensor& segment_ids, bool, double logit_cap) {
  checks::relative_attention(q, k, v, bias, segment_ids, logit_cap);
  return {at::empty_symint(q.sym_sizes(), q.options()),
          at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1)},
                           q.options().dtype(accumulation_dtype(q.scalar_type())))};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(const Tensor&, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, const Tensor& bias, const OptionalTensor&,
                                                         const Tensor&, bool, double) {
  const auto like = [](const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); };
  return {like(q), like(k), like(v), like(bias)};
}

}  // namespace

Tensor relative_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                          const OptionalTensor& segment_ids, bool extra_logit, double logit_cap) {
  using Signature =
      Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, double);
  static const auto op = find_op<Signature>(kOp);
  return op.call(q, k, v, bias, segment_ids, extra_logit, logit_cap);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "relative_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? segment_ids, bool extra_logit=True, "
      "float logit_cap=0.) -> Tensor",
      tags);
  // lse [B, H, S]: the log of the softmax's denominator, infinity where a position sees nothing.
  m.def(
      "_relative_attention_forward(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? segment_ids, "
      "bool extra_logit, float logit_cap) -> (Tensor out, Tensor lse)",
      tags);
  m.def(
      "_relative_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? segment_ids, "
      "Tensor lse, bool extra_logit, float logit_cap) -> (Tensor q, Tensor k, Tensor v, Tensor bias)",
      tags);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("relative_attention", attention_autograd);
  m.impl("_relative_attention_forward", refuse_double_backward());
  m.impl("_relative_attention_backward", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, CompositeExplicitAutograd, m) { m.impl("relative_attention", attention_below_autograd); }
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("_relative_attention_forward", forward_meta);
  m.impl("_relative_attention_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) { m.impl("relative_attention", autocast_leading_arguments<3>()); }
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) { m.impl("relative_attention", autocast_leading_arguments<3>()); }

}  // namespace glam
