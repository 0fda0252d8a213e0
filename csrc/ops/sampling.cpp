// Random numbers from counters, and the choice of a token from logits with one of them.
//
// counter_uniform: out[...] in [0, 1) float32 = the first word of Philox 4x32-10 with key `seed` and counter
//   (index[...], stream), its upper 24 bits over 2^24. index int64 of any shape. A pure function: no generator state.
// sample_logits: logits [B, V] float32 or float64, uniform [B] float32 in [0, 1) -> int64 [B].
//   Candidates are ordered by logit, largest first, lower index first among equals; weights are exp(logit / temperature).
//   top_k > 0 keeps the first k; top_p < 1 keeps of these the fewest that hold at least top_p of the weight. The choice
//   is the first candidate at which the running weight exceeds uniform * (weight kept), all in float64.
//   temperature = 0 takes the largest logit, the lowest index among equals. -inf forbids a token; NaN raises on CPU.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"

namespace glam {
namespace {

constexpr auto kSample = "glam::sample_logits";
constexpr auto kUniform = "glam::counter_uniform";

}  // namespace

void checks::sample_logits(const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k,
                           double top_p) {
  TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble, kSample,
              ": expected logits to be Float or Double, got ", logits.scalar_type());
  check_dim(kSample, "logits", logits, "[B, V]", 2);
  check_dtype(kSample, "uniform", uniform, at::kFloat);
  check_shape(kSample, "uniform", uniform, "[B]", {logits.sym_size(0)});
  check_same_device(kSample, uniform, logits);
  TORCH_CHECK(temperature >= 0, kSample, ": expected temperature >= 0 (0: the largest logit), got ", temperature);
  TORCH_CHECK(top_k >= 0, kSample, ": expected top_k >= 0 (0: all), got ", top_k);
  TORCH_CHECK(top_p > 0 && top_p <= 1, kSample, ": expected top_p in (0, 1], got ", top_p);
}

void checks::counter_uniform(const Tensor& index) { check_dtype(kUniform, "index", index, at::kLong); }

namespace {

Tensor sample_meta(const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k, double top_p) {
  checks::sample_logits(logits, uniform, temperature, top_k, top_p);
  return at::empty_symint({logits.sym_size(0)}, logits.options().dtype(at::kLong));
}

Tensor uniform_meta(int64_t, int64_t, const Tensor& index) {
  checks::counter_uniform(index);
  return at::empty_symint(index.sym_sizes(), index.options().dtype(at::kFloat));
}

}  // namespace

Tensor sample_logits(const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k, double top_p) {
  using Signature = Tensor(const Tensor&, const Tensor&, double, int64_t, double);
  static const auto op = find_op<Signature>(kSample);
  return op.call(logits, uniform, temperature, top_k, top_p);
}

Tensor counter_uniform(int64_t seed, int64_t stream, const Tensor& index) {
  static const auto op = find_op<Tensor(int64_t, int64_t, const Tensor&)>(kUniform);
  return op.call(seed, stream, index);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("sample_logits(Tensor logits, Tensor uniform, float temperature=1., int top_k=0, float top_p=1.) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("counter_uniform(int seed, int stream, Tensor index) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("sample_logits", not_differentiable());
  m.impl("counter_uniform", not_differentiable());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("sample_logits", sample_meta);
  m.impl("counter_uniform", uniform_meta);
}

}  // namespace glam
