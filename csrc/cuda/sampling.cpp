// CUDA kernels of glam::sample_logits and glam::counter_uniform. Candidates are sorted by the library.
//
// Values are not read on the host. Where the CPU kernel raises (a NaN logit, a largest logit that is not finite, a
// uniform number outside [0, 1)) the choice is -1 here, and the embedding of -1 is NaN.

#include "cuda/kernels/sampling.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>

#include <algorithm>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

Tensor sample(const Tensor& logits_, const Tensor& uniform_, double temperature, int64_t top_k, double top_p) {
  checks::sample_logits(logits_, uniform_, temperature, top_k, top_p);
  const int64_t B = logits_.size(0), V = logits_.size(1);
  TORCH_CHECK(B == 0 || V > 0, "glam::sample_logits: expected logits to be [B, V] with V >= 1, got V = 0");
  const OnDevice device(logits_);
  const Tensor logits = logits_.contiguous(), uniform = uniform_.contiguous();
  const Tensor chosen = at::empty({B}, logits.options().dtype(at::kLong));
  if (B == 0) return chosen;
  if (temperature == 0) {
    choose_largest(data(logits), type_of(logits), uniform.const_data_ptr<float>(), B, V,
                   chosen.mutable_data_ptr<int64_t>(), device.stream());
    return chosen;
  }
  // A stable sort: the lower index comes first among equal logits.
  auto [sorted, order] = at::sort(logits, std::optional<bool>(true), -1, /*descending=*/true);
  sorted = sorted.contiguous();
  order = order.contiguous();
  sample_sorted(data(sorted), type_of(sorted), order.const_data_ptr<int64_t>(), uniform.const_data_ptr<float>(), B, V,
                temperature, top_k > 0 ? std::min(top_k, V) : V, top_p, chosen.mutable_data_ptr<int64_t>(),
                device.stream());
  return chosen;
}

Tensor uniform(int64_t seed, int64_t stream, const Tensor& index_) {
  checks::counter_uniform(index_);
  const OnDevice device(index_);
  const Tensor index = index_.contiguous();
  const Tensor out = at::empty(index.sizes(), index.options().dtype(at::kFloat));
  counter_uniform(seed, stream, index.const_data_ptr<int64_t>(), index.numel(), out.mutable_data_ptr<float>(),
                  device.stream());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("sample_logits", sample);
  m.impl("counter_uniform", uniform);
}

}  // namespace glam::cuda
