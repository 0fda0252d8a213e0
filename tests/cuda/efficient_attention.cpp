// torch's memory-efficient attention, which it has for GPUs alone, in plain ops on the CPU, as far as csrc/cuda/attention.cpp
// asks for it: what the emulated kernels are used with. Probabilities and their gradients are rounded to the dtype of q
// before they are multiplied, as there; what is undefined there is NaN here: the lse's padding and the gradient of a
// masked bias.
//
// query [B, N, H, A], key, value [B, L, H, A], bias [B, H, N, L]. Of a query that sees nothing the output is 0.
// Source: aten/src/ATen/native/transformers/cuda (attention.cu, attention_backward.cu and mem_eff_attention).

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kCausal = 1, kLseColumns = 32, kBiasColumns = 16;
constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

Tensor heads_first(const Tensor& x) { return x.to(at::kFloat).transpose(1, 2); }

// [B, H, N, L] float32, -infinity where masked.
Tensor logits_of(const Tensor& query, const Tensor& key, const OptionalTensor& bias, int64_t mask) {
  Tensor logits = at::matmul(heads_first(query), heads_first(key).transpose(2, 3));
  if (bias) logits = logits + *bias;
  if (mask != kCausal) return logits;
  const Tensor later = at::ones({query.size(1), key.size(1)}, logits.options().dtype(at::kBool)).triu(1);
  return logits.masked_fill(later, -kInfinity);
}

Tensor rounded_like(const Tensor& values, const Tensor& x) { return values.to(x.scalar_type()).to(at::kFloat); }

void check(double dropout, const std::optional<double>& scale) {
  TORCH_CHECK(dropout == 0. && scale == 1., "expected no dropout and a scale of 1, got ", dropout, " and ", scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias, const OptionalTensor&,
    const OptionalTensor&, std::optional<c10::SymInt>, std::optional<c10::SymInt>, double dropout, int64_t mask, bool,
    std::optional<double> scale, const OptionalTensor&, std::optional<int64_t>) {
  check(dropout, scale);
  const Tensor logits = logits_of(query, key, bias, mask);
  const Tensor lse = logits.logsumexp(-1);
  const Tensor largest = std::get<0>(logits.max(-1, true)).clamp_min(-std::numeric_limits<float>::max());
  const Tensor numerators = (logits - largest).exp();
  const Tensor sums = numerators.sum(-1, true);
  const Tensor average = at::matmul(rounded_like(numerators, query), heads_first(value)) / sums;
  const Tensor out = average.masked_fill(sums == 0, 0).transpose(1, 2).contiguous().to(query.scalar_type());
  const int64_t N = query.size(1);
  const Tensor none = at::zeros({}, query.options().dtype(at::kLong));
  return {out, at::constant_pad_nd(lse, {0, padded(N, kLseColumns) - N}, kNaN), none, none, N, key.size(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const OptionalTensor& bias, const Tensor& out,
                                                    const OptionalTensor&, const OptionalTensor&, c10::SymInt,
                                                    c10::SymInt, const Tensor& lse, double dropout, const Tensor&,
                                                    const Tensor&, int64_t mask, bool, std::optional<double> scale,
                                                    std::optional<int64_t> splits, std::optional<int64_t>, bool) {
  check(dropout, scale);
  TORCH_CHECK(splits == 1, "expected the keys in one split, got ", splits);
  const int64_t B = query.size(0), N = query.size(1), H = query.size(2), L = key.size(1);
  TORCH_CHECK(lse.size(2) == padded(N, kLseColumns), "expected lse to be padded, got ", lse.sizes());
  const Tensor logits = logits_of(query, key, bias, mask);
  const Tensor probabilities = (logits - lse.narrow(2, 0, N).unsqueeze(3)).exp();
  const Tensor grad = heads_first(grad_out);
  const Tensor delta = (grad * heads_first(out)).sum(-1, true);
  const Tensor grad_probabilities = at::matmul(grad, heads_first(value).transpose(2, 3));
  const Tensor grad_logits = rounded_like(probabilities * (grad_probabilities - delta), query);
  const auto put = [&](const Tensor& heads) { return heads.transpose(1, 2).contiguous().to(query.scalar_type()); };
  Tensor grad_bias = at::full({B, H, N, padded(L, kBiasColumns)}, kNaN, query.options()).narrow(3, 0, L);
  const Tensor later = at::ones({N, L}, logits.options().dtype(at::kBool)).triu(1);
  grad_bias.copy_(grad_logits);
  if (mask == kCausal) grad_bias.masked_fill_(later, kNaN);
  return {put(at::matmul(grad_logits, heads_first(key))),
          put(at::matmul(grad_logits.transpose(2, 3), heads_first(query))),
          put(at::matmul(rounded_like(probabilities, query).transpose(2, 3), grad)), grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_efficient_attention_forward", forward);
  m.impl("_efficient_attention_backward", backward);
}
