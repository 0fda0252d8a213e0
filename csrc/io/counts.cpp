// Parameter counts of a GLaM configuration, by arithmetic alone.
//
// n = L*4*D*H*A (attention) + dense layers * 3*D*F + MoE layers * (E*m*D*F + D*E) + V*D (tied) + (2L+1)*D + 32*H*L,
// with m = 2 matrices per expert (3 for geglu). Active: E experts become the 2 that a token visits.
// Checked to the unit against the counts stated in tensorflow/lingvo synthetic_packed_input.py.

#include "glam/config.h"

namespace glam {
namespace {

constexpr int64_t kRelativeBuckets = 32;
constexpr int64_t kExpertsPerToken = 2;

}  // namespace

ParameterCount count_parameters(const GLaMConfig& config) {
  config.validate();
  const int64_t num_moe = config.num_moe_layers();
  const int64_t ffn_matrix = config.model_dim * config.hidden_dim;
  const int64_t expert = (config.expert_activation == "geglu" ? 3 : 2) * ffn_matrix;

  ParameterCount count;
  count.attention = config.num_layers * 4 * config.model_dim * config.num_heads * config.head_dim;
  count.dense_ffn = (config.num_layers - num_moe) * 3 * ffn_matrix;
  count.experts = num_moe * config.num_experts * expert;
  count.router = num_moe * config.model_dim * config.num_experts;
  count.embedding = (config.tie_embedding ? 1 : 2) * config.vocab_size * config.model_dim;
  count.norms = (2 * config.num_layers + 1) * config.model_dim;
  count.relative_bias = config.num_layers * config.num_heads * kRelativeBuckets;
  count.total = count.attention + count.dense_ffn + count.experts + count.router + count.embedding + count.norms +
                count.relative_bias;
  count.active = count.total - count.experts + num_moe * kExpertsPerToken * expert;
  return count;
}

}  // namespace glam
