// Attention of new tokens over a cache, for generation, and the reordering of a cache by beams.
//
// relative_attention_step: q, k, v [B, N, H, A] are N >= 1 new tokens of each row (a prompt, or one token); k and v are
//   written into k_cache, v_cache [B, L, H, A] at positions[b] .. positions[b] + N - 1, and each new token attends to its
//   row of the cache up to itself. positions int32 [B]; -1: a finished row, nothing is written, its output is 0.
//   The same kernel as relative_attention: the same bits, however a row is cut into pieces.
// reorder_cache_: cache[b] <- old cache[beams[b]], beams int64 [B], in place with no second copy of the cache.
// Neither is differentiable; both bump the versions of what they write.

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "glam/ops.h"
#include "ops/checks.h"
#include "ops/relative_buckets.h"

namespace glam {
namespace {

constexpr auto kStep = "glam::relative_attention_step";
constexpr auto kReorder = "glam::reorder_cache_";

using StepSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&,
                             const Tensor&, bool, double);

const auto& step_op() {
  static const auto op = find_op<StepSignature>(kStep);
  return op;
}

}  // namespace

void checks::relative_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                     const Tensor& v_cache, const Tensor& positions, const Tensor& bias,
                                     double logit_cap) {
  check_floating(kStep, "q", q);
  check_dim(kStep, "q", q, "[B, N, H, A]", 4);
  for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_same_dtype(kStep, name, *tensor, "q", q);
    check_shape(kStep, name, *tensor, "[B, N, H, A]", q.sym_sizes().vec());
    check_same_device(kStep, *tensor, q);
  }
  check_shape(kStep, "k_cache", k_cache, "[B, L, H, A]", {q.sym_size(0), -1, q.sym_size(2), q.sym_size(3)});
  check_shape(kStep, "v_cache", v_cache, "[B, L, H, A]", k_cache.sym_sizes().vec());
  for (const auto& [name, tensor] : {std::pair{"k_cache", &k_cache}, std::pair{"v_cache", &v_cache}}) {
    check_same_dtype(kStep, name, *tensor, "q", q);
    check_same_device(kStep, *tensor, q);
  }
  check_dtype(kStep, "positions", positions, at::kInt);
  check_shape(kStep, "positions", positions, "[B]", {q.sym_size(0)});
  check_same_device(kStep, positions, q);
  check_shape(kStep, "bias", bias, "[H, 32]", {q.sym_size(2), kNumBuckets});
  check_weight_dtype(kStep, "bias", bias, q);
  check_same_device(kStep, bias, q);
  TORCH_CHECK(logit_cap >= 0, kStep, ": expected logit_cap >= 0 (0: none), got ", logit_cap);
}

void checks::reorder_cache(const Tensor& cache, const Tensor& beams) {
  TORCH_CHECK(cache.dim() >= 1, kReorder, ": expected cache to be [B, ...] with at least 1 dimension, got a scalar");
  check_dtype(kReorder, "beams", beams, at::kLong);
  check_shape(kReorder, "beams", beams, "[B]", {cache.sym_size(0)});
  check_same_device(kReorder, beams, cache);
}

namespace {

Tensor step_meta(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
                 const Tensor& positions, const Tensor& bias, bool, double logit_cap) {
  checks::relative_attention_step(q, k, v, k_cache, v_cache, positions, bias, logit_cap);
  return at::empty_symint(q.sym_sizes(), q.options());
}

// The cache decides the dtype: it was allocated before.
Tensor step_autocast(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
                     const Tensor& positions, const Tensor& bias, bool extra_logit, double logit_cap) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto cast = [&](const Tensor& x) {
    return at::autocast::cached_cast(k_cache.scalar_type(), x, x.device().type());
  };
  return step_op().call(cast(q), cast(k), cast(v), k_cache, v_cache, positions, bias, extra_logit, logit_cap);
}

void reorder_meta(Tensor& cache, const Tensor& beams) { checks::reorder_cache(cache, beams); }

}  // namespace

Tensor relative_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
                               const Tensor& positions, const Tensor& bias, bool extra_logit, double logit_cap) {
  return step_op().call(q, k, v, k_cache, v_cache, positions, bias, extra_logit, logit_cap);
}

void reorder_cache_(Tensor& cache, const Tensor& beams) {
  static const auto op = find_op<void(Tensor&, const Tensor&)>(kReorder);
  op.call(cache, beams);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def(
      "relative_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor positions, Tensor bias, bool extra_logit=True, float logit_cap=0.) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("reorder_cache_(Tensor(a!) cache, Tensor beams) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("relative_attention_step", not_differentiable());
  m.impl("reorder_cache_", not_differentiable());
}
TORCH_LIBRARY_IMPL(glam, ADInplaceOrView, m) {
  m.impl("relative_attention_step", bump_mutated_versions());
  m.impl("reorder_cache_", bump_mutated_versions());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("relative_attention_step", step_meta);
  m.impl("reorder_cache_", reorder_meta);
}
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) { m.impl("relative_attention_step", step_autocast); }
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) { m.impl("relative_attention_step", step_autocast); }

}  // namespace glam
