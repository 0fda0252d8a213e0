// The layers of GLaM: norms, attention, dense GEGLU feed-forward, mixture of experts. Shells over the ops; the wiring and
// its order are those of glam_ext/functional.py.

#include <glam/nn.h>
#include <glam/ops.h>
#include <torch/torch.h>

#include "distributed/collectives.h"
#include "ops/large_memory.h"

namespace glam::nn {
namespace {

Tensor parameter(torch::nn::Module& module, const char* name, at::IntArrayRef sizes, torch::Device device) {
  return module.register_parameter(name, empty_lasting(sizes, torch::dtype(torch::kFloat).device(device)));
}

// The counter stream of one layer's noise (0) or jitter (1) in one step.
int64_t stream_of(const Randomness& random, const GLaMConfig& config, int64_t layer, int64_t use) {
  return (random.step * config.num_layers + layer) * 2 + use;
}

}  // namespace

NormImpl::NormImpl(const GLaMConfig& config, torch::Device device) : eps(config.norm_eps) {
  scale = parameter(*this, "scale", {config.model_dim}, device);
}

Tensor NormImpl::forward(const Tensor& x) { return glam::rms_norm(x, scale, eps); }

EmbeddingImpl::EmbeddingImpl(const GLaMConfig& config, torch::Device device) {
  weight = parameter(*this, "weight", {config.vocab_size, config.model_dim}, device);
}

AttentionImpl::AttentionImpl(const GLaMConfig& config, torch::Device device)
    : num_heads_(config.num_heads),
      head_dim_(config.head_dim),
      extra_logit_(config.attention_extra_logit),
      logit_cap_(config.attention_logit_cap) {
  const int64_t D = config.model_dim, width = config.num_heads * config.head_dim;
  q = parameter(*this, "q", {D, width}, device);
  k = parameter(*this, "k", {D, width}, device);
  v = parameter(*this, "v", {D, width}, device);
  o = parameter(*this, "o", {width, D}, device);
  relative_bias = parameter(*this, "relative_bias", {config.num_heads, 32}, device);
}

Tensor AttentionImpl::heads(const Tensor& h, const Tensor& weight) const {
  return glam::linear(h, weight).view({h.size(0), h.size(1), num_heads_, head_dim_});
}

Tensor AttentionImpl::forward(const Tensor& h_BSD, const std::optional<Tensor>& segment_ids) {
  // Named first: the order of these nodes is the order in which their gradients of h are added.
  const Tensor q_BSHA = heads(h_BSD, q), k_BSHA = heads(h_BSD, k), v_BSHA = heads(h_BSD, v);
  const Tensor y_BSHA =
      relative_attention(q_BSHA, k_BSHA, v_BSHA, relative_bias, segment_ids, extra_logit_, logit_cap_);
  return glam::linear(y_BSHA.flatten(2), o);
}

Tensor AttentionImpl::step(const Tensor& h_BND, Tensor k_cache, Tensor v_cache, const Tensor& positions) {
  const Tensor y_BNHA = relative_attention_step(heads(h_BND, q), heads(h_BND, k), heads(h_BND, v), k_cache, v_cache,
                                                positions, relative_bias, extra_logit_, logit_cap_);
  return glam::linear(y_BNHA.flatten(2), o);
}

FeedForwardImpl::FeedForwardImpl(const GLaMConfig& config, torch::Device device) {
  w0 = parameter(*this, "w0", {config.model_dim, config.hidden_dim}, device);
  w1 = parameter(*this, "w1", {config.model_dim, config.hidden_dim}, device);
  wo = parameter(*this, "wo", {config.hidden_dim, config.model_dim}, device);
}

Tensor FeedForwardImpl::forward(const Tensor& h_BSD) { return geglu_mlp(h_BSD, w0, w1, wo); }

MoEImpl::MoEImpl(const GLaMConfig& config, int64_t layer, torch::Device device, const ExpertParallel& parallel)
    : config_(config), parallel_(parallel), num_ranks_(collectives::group_size(parallel.group)), layer_(layer) {
  const int64_t D = config.model_dim, F = config.hidden_dim, E = config.num_experts / num_ranks_;
  router = parameter(*this, "router", {D, config.num_experts}, device);
  wi = parameter(*this, "wi", {E, D, F}, device);
  wo = parameter(*this, "wo", {E, F, D}, device);
  if (config.expert_activation == "geglu") wg = parameter(*this, "wg", {E, D, F}, device);
}

Tensor MoEImpl::router_logits(const Tensor& h_TD, bool training, const Randomness& random) const {
  Tensor h = h_TD;
  if (training && config_.router_jitter > 0) {
    const Tensor index =
        torch::arange(h.numel(), torch::device(h.device())).view(h.sizes()) + random.first_token * h.size(1);
    const Tensor uniform = counter_uniform(random.seed, stream_of(random, config_, layer_, 1), index);
    h = to_compute_dtype(h, "float32") * ((uniform * 2. - 1.) * config_.router_jitter + 1.);
  }
  Tensor z_TE = glam::router_logits(h, router);
  const double cap = config_.router_logit_cap;
  if (cap > 0) z_TE = torch::tanh(z_TE / cap) * cap;
  return z_TE;
}

std::optional<Tensor> MoEImpl::noise(const Tensor& z_TE, bool training, const Randomness& random) const {
  if (!training || config_.second_policy == "all") return std::nullopt;
  const int64_t stream = stream_of(random, config_, layer_, 0);
  const auto options = torch::device(z_TE.device());
  if (config_.second_policy == "random") {
    return counter_uniform(random.seed, stream, torch::arange(z_TE.size(0), options) + random.first_token);
  }
  return counter_uniform(random.seed, stream,
                         torch::arange(z_TE.numel(), options).view(z_TE.sizes()) + random.first_token * z_TE.size(1));
}

std::optional<Tensor> MoEImpl::gate_weight() const { return wg.defined() ? std::optional<Tensor>(wg) : std::nullopt; }

Tensor MoEImpl::expert_place(const Tensor& expert_ids) const {
  if (parallel_.chunks == 1) return expert_ids;
  const Tensor experts = torch::arange(config_.num_experts, expert_ids.options());
  const Tensor place = experts.view({parallel_.chunks, num_ranks_, -1}).transpose(0, 1).flatten();
  return place.index({expert_ids.to(torch::kLong)});
}

Tensor MoEImpl::exchanged_experts(const Tensor& h_TD, const Tensor& gates, const Tensor& expert_ids,
                                  const Tensor& positions, int64_t group_size, int64_t slots) const {
  const int64_t chunks = parallel_.chunks, parts = chunks * num_ranks_;
  const auto [row_of_choice, choice_of_row, offsets] =
      routing_plan(expert_place(expert_ids), positions, config_.num_experts, group_size, slots);
  const Tensor rows_RD = dispatch(h_TD, row_of_choice, choice_of_row, offsets);
  Tensor segments = offsets;  // with slots: what is received lies as what was sent
  std::vector<int64_t> out_splits, in_splits;
  if (slots < 0) {
    const auto from_zero = [](const Tensor& sizes) {
      return torch::cat({sizes.slice(0, 0, 1) * 0, sizes}).cumsum(0).to(torch::kInt);
    };
    const Tensor rows_of_expert =
        (offsets.slice(0, 1) - offsets.slice(0, 0, -1)).view({chunks, num_ranks_, -1}).transpose(0, 1).flatten();
    const Tensor counts = exchange_counts(from_zero(rows_of_expert), parallel_.group)
                              .view({2, num_ranks_, chunks, -1})
                              .transpose(1, 2);                            // sent and received, chunk, rank, expert
    const Tensor splits = counts.sum(3).flatten().to(torch::kLong).cpu();  // the layer's only wait of the host
    const auto* const begin = splits.const_data_ptr<int64_t>();
    in_splits.assign(begin, begin + parts);
    out_splits.assign(begin + parts, begin + 2 * parts);
    segments = from_zero(counts[1].flatten());
  }
  const Tensor out_RD = exchange_mlp(rows_RD, segments, out_splits, in_splits, wi, wo, gate_weight(),
                                     config_.expert_activation, parallel_.group, chunks);
  return combine(out_RD, gates, row_of_choice, choice_of_row, offsets);
}

MoEImpl::Routed MoEImpl::routed(const Tensor& h_BSD, const std::optional<Tensor>& token_mask, bool training,
                                const Randomness& random) {
  const Tensor h_TD = h_BSD.flatten(0, 1);
  const Tensor z_TE = router_logits(h_TD, training, random);
  const int64_t group_size = config_.group_size == 0    ? h_BSD.size(1)
                             : config_.group_size == -1 ? h_TD.size(0)
                                                        : config_.group_size;
  const int64_t slots = config_.capacity(group_size, training);
  const auto [gates, expert_ids, positions, aux_G] = top2_gating(
      z_TE, token_mask, noise(z_TE, training, random), group_size, slots, training ? config_.second_policy : "all",
      config_.second_threshold, config_.normalize_before_capacity);
  Tensor y_TD;
  if (parallel_.group.empty()) {
    const auto [row_of_choice, choice_of_row, offsets] = routing_plan(expert_ids, positions, config_.num_experts);
    y_TD =
        moe_mlp(h_TD, gates, row_of_choice, choice_of_row, offsets, wi, wo, gate_weight(), config_.expert_activation);
  } else {
    y_TD = exchanged_experts(h_TD, gates, expert_ids, positions, group_size, slots);
  }
  return {y_TD.view(h_BSD.sizes()), z_TE, aux_G, expert_ids, positions};
}

MoEOutput MoEImpl::forward(const Tensor& h_BSD, const std::optional<Tensor>& token_mask, bool training,
                           const Randomness& random) {
  const Routed out = routed(h_BSD, token_mask, training, random);
  Tensor lse_T = torch::logsumexp(out.z_TE, 1);
  if (token_mask) lse_T = torch::where(*token_mask, lse_T, torch::zeros_like(lse_T));
  return {out.y_BSD, out.aux_G.mean(), ordered_sum(lse_T * lse_T),
          router_statistics(out.expert_ids, out.positions, config_.num_experts)};
}

Tensor MoEImpl::infer(const Tensor& h_BSD, const std::optional<Tensor>& token_mask) {
  return routed(h_BSD, token_mask, /*training=*/false, {}).y_BSD;
}

}  // namespace glam::nn
