// Initial values. Each number depends on (seed, parameter name, expert id, index within the matrix) alone: any layout of
// experts over ranks and both languages start from the same model.
//
// Standard deviations: embedding 1; q (D A)^-0.5, which stands in for the missing 1/sqrt(A) of the logits; k, v D^-0.5;
// o (H A)^-0.5; relative_bias (32 H)^-0.5, all normal; feed-forward matrices and the router uniform on +-sqrt(3 / fan_in).
// Norm scales are 1. Source: google/praxis attentions.py, transformers.py and tensorflow/lingvo gshard_builder.py.

#include <ATen/Parallel.h>
#include <glam/nn.h>
#include <torch/torch.h>

#include <cmath>
#include <numbers>
#include <string_view>

#include "ops/philox.h"

namespace glam::nn {
namespace {

// FNV-1a: a stable 64-bit stream number of a name.
int64_t stream_of(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return static_cast<int64_t>(hash);
}

struct Distribution {
  bool normal;
  double scale;  // standard deviation, or half the width
};

// One loop per element: one float32 temporary, and no bits that depend on how a library vectorises.
void fill(const Tensor& values, const Distribution& distribution, int64_t seed, const std::string& name) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t stream = stream_of(name);
  const Tensor numbers = torch::empty(values.sizes(), torch::kFloat);
  auto* const out = numbers.mutable_data_ptr<float>();
  at::parallel_for(0, numbers.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto words = philox4x32(seed, stream, i);
      const double first = uniform_from_word(words[0]), second = uniform_from_word(words[1]);
      const double number = distribution.normal  // Box-Muller
                                ? std::sqrt(-2. * std::log1p(-first)) * std::cos(2. * std::numbers::pi * second)
                                : 2. * first - 1.;
      out[i] = static_cast<float>(distribution.scale * number);
    }
  });
  values.copy_(numbers);
}

std::optional<Distribution> distribution_of(const std::string& name, const Tensor& value, const GLaMConfig& config) {
  const std::string leaf = name.substr(name.rfind('.') + 1);
  if (leaf == "scale") return std::nullopt;
  const double D = static_cast<double>(config.model_dim), H = static_cast<double>(config.num_heads);
  const double A = static_cast<double>(config.head_dim);
  if (leaf == "weight") return Distribution{true, 1.};
  if (leaf == "q") return Distribution{true, std::pow(D * A, -0.5)};
  if (leaf == "k" || leaf == "v") return Distribution{true, std::pow(D, -0.5)};
  if (leaf == "o") return Distribution{true, std::pow(H * A, -0.5)};
  if (leaf == "relative_bias") return Distribution{true, std::pow(32. * H, -0.5)};
  return Distribution{false, std::sqrt(3. / static_cast<double>(value.size(-2)))};  // feed-forward and router
}

}  // namespace

void initialize(GLaMImpl& model, int64_t seed) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : model.named_parameters()) {
    const Tensor& value = item.value();
    if (value.is_meta()) continue;
    const auto distribution = distribution_of(item.key(), value, model.config());
    if (!distribution) {
      value.fill_(1);
    } else if (value.dim() == 3) {
      for (int64_t e = 0; e < value.size(0); ++e) {
        const int64_t expert = model.first_local_expert() + e;
        fill(value[e], *distribution, seed, item.key() + "#" + std::to_string(expert));
      }
    } else {
      fill(value, *distribution, seed, item.key());
    }
  }
}

}  // namespace glam::nn
