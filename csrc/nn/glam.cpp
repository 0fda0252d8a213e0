// The block and the whole model: embedding, blocks, final norm, tied output layer; forward, loss and cached step.

#include <glam/nn.h>
#include <glam/ops.h>
#include <torch/torch.h>

#include "distributed/collectives.h"
#include "nn/recompute.h"

namespace glam::nn {
namespace {

// The ops see flattened tensors, so a transposed one would pass there.
void check_batch(const char* method, const char* name, const Tensor& tensor, torch::ScalarType dtype,
                 at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.scalar_type() == dtype && tensor.sizes() == sizes, method, ": expected ", name, " to be ", dtype,
              " ", sizes, ", got ", tensor.scalar_type(), " ", tensor.sizes());
}

void check_tokens(const char* method, const Tensor& tokens) {
  TORCH_CHECK(tokens.dim() == 2 && tokens.scalar_type() == torch::kLong, method,
              ": expected tokens to be Long [B, S], got ", tokens.scalar_type(), " ", tokens.sizes());
}

bool is_expert_weight(std::string_view name) {
  return name.ends_with(".moe.wi") || name.ends_with(".moe.wg") || name.ends_with(".moe.wo");
}

// The transposed table is what is packed.
bool is_packed(const Tensor& table) { return table.dim() == 3; }

}  // namespace

BlockImpl::BlockImpl(const GLaMConfig& config, int64_t layer, torch::Device device, const ExpertParallel& parallel) {
  attention_norm = register_module("attention_norm", Norm(config, device));
  attention = register_module("attention", Attention(config, device));
  ffn_norm = register_module("ffn_norm", Norm(config, device));
  if (config.is_moe_layer(layer)) {
    moe = register_module("moe", MoE(config, layer, device, parallel));
  } else {
    ffn = register_module("ffn", FeedForward(config, device));
  }
}

BlockOutput BlockImpl::forward(const Tensor& x_BSD, const std::optional<Tensor>& segment_ids,
                               const std::optional<Tensor>& token_mask, bool training, const Randomness& random) {
  const Tensor attended_BSD = x_BSD + attention(attention_norm(x_BSD), segment_ids), h_BSD = ffn_norm(attended_BSD);
  if (!moe) return {attended_BSD + ffn(h_BSD), {}, {}, {}};
  const MoEOutput out = moe(h_BSD, token_mask, training, random);
  return {attended_BSD + out.y_BSD, out.aux, out.router_z, out.statistics};
}

Tensor BlockImpl::step(const Tensor& x_BND, Tensor k_cache, Tensor v_cache, const Tensor& positions,
                       const Tensor& token_mask) {
  const Tensor attended_BND = x_BND + attention->step(attention_norm(x_BND), k_cache, v_cache, positions);
  const Tensor h_BND = ffn_norm(attended_BND);
  return attended_BND + (moe ? moe->infer(h_BND, token_mask) : ffn(h_BND));
}

GLaMImpl::GLaMImpl(const GLaMConfig& config, std::optional<int64_t> seed, torch::Device device,
                   const ExpertParallel& parallel)
    : config_(config), parallel_(parallel) {
  config_.validate();
  const int64_t ranks = collectives::group_size(parallel.group), experts = config.num_experts;
  if (config.num_moe_layers() > 0) {
    TORCH_CHECK(experts % ranks == 0, "glam::GLaM: expected num_experts to be a multiple of the ", ranks,
                " ranks of the expert group, got ", experts);
    num_local_experts_ = experts / ranks;
    first_local_expert_ = collectives::group_rank(parallel.group) * num_local_experts_;
    TORCH_CHECK(parallel.chunks >= 1 && num_local_experts_ % parallel.chunks == 0,
                "glam::GLaM: expected exchange chunks to divide the ", num_local_experts_, " experts of a rank, got ",
                parallel.chunks);
  }
  embedding_ = register_module("embedding", Embedding(config, device));
  layers_ = register_module("layers", torch::nn::ModuleList());
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    layers_->push_back(Block(config, layer, device, parallel));
  }
  final_norm_ = register_module("final_norm", Norm(config, device));
  if (!config.tie_embedding) output_ = register_module("output", Embedding(config, device));
  if (seed) initialize(*this, *seed);
}

Tensor GLaMImpl::embed(const Tensor& tokens) const {
  return to_compute_dtype(glam::embedding(tokens, embedding_->weight), config_.compute_dtype);
}

const Tensor& GLaMImpl::output_table() const { return config_.tie_embedding ? embedding_->weight : output_->weight; }

Tensor GLaMImpl::output_logits(const Tensor& h) const {
  const Tensor& table_VD = output_table();
  const double scale = std::pow(static_cast<double>(config_.model_dim), -0.5);
  const Tensor logits = linear_wide(h, is_packed(table_VD) ? table_VD : table_VD.t()).mul_(scale);
  return config_.logit_cap > 0 ? torch::tanh(logits / config_.logit_cap) * config_.logit_cap : logits;
}

torch::OrderedDict<std::string, Tensor> GLaMImpl::expert_parameters() const {
  torch::OrderedDict<std::string, Tensor> experts;
  for (const auto& item : named_parameters()) {
    if (is_expert_weight(item.key())) experts.insert(item.key(), item.value());
  }
  return experts;
}

// Capped routing sends equal splits. On a GPU nothing waits: the assertion is the device's.
void GLaMImpl::check_equal_batches(const Tensor& tokens) const {
  const bool capped = config_.capacity(/*group_size=*/1, is_training()) >= 0;
  if (parallel_.group.empty() || !capped) return;
  const int64_t ranks = collectives::group_size(parallel_.group);
  const Tensor ends = torch::arange(ranks + 1, torch::dtype(torch::kInt).device(tokens.device())) * tokens.numel();
  const Tensor counts = exchange_counts(ends, parallel_.group);
  torch::_assert_async(
      (counts[0] == counts[1]).all(),
      "glam::GLaM: expected the same number of tokens, padding included, on every rank of the expert group with capped "
      "routing, got different ones; pad the batches to one shape, or set capacity_factor to drop nothing");
}

GLaMImpl::Hidden GLaMImpl::hidden_states(const Tensor& tokens, const std::optional<Tensor>& segment_ids,
                                         const Randomness& random) {
  check_tokens("glam::GLaM", tokens);
  TORCH_CHECK(tokens.numel() > 0, "glam::GLaM: expected at least one token, got ", tokens.sizes());
  if (segment_ids) check_batch("glam::GLaM", "segment_ids", *segment_ids, torch::kInt, tokens.sizes());
  check_equal_batches(tokens);
  Tensor x_BSD = embed(tokens);
  std::optional<Tensor> token_mask;
  if (segment_ids) token_mask = segment_ids->flatten() != 0;
  Hidden hidden;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    BlockImpl& block = layers_->at<BlockImpl>(layer);
    const bool training = is_training(), recompute = config_.recompute && training && torch::GradMode::is_enabled();
    const BlockOutput out = recompute ? forward_with_recompute(block, x_BSD, segment_ids, token_mask, training, random)
                                      : block.forward(x_BSD, segment_ids, token_mask, training, random);
    x_BSD = out.x_BSD;
    if (!out.aux.defined()) continue;
    hidden.aux.push_back(out.aux);
    hidden.router_z.push_back(out.router_z);
    hidden.statistics.push_back(out.statistics);
  }
  hidden.h_BSD = final_norm_(x_BSD);
  return hidden;
}

Tensor GLaMImpl::forward(const Tensor& tokens, const std::optional<Tensor>& segment_ids, const Randomness& random) {
  return output_logits(hidden_states(tokens, segment_ids, random).h_BSD);
}

Loss GLaMImpl::loss(const Tensor& tokens, const Tensor& targets, const std::optional<Tensor>& weights,
                    const std::optional<Tensor>& segment_ids, const Randomness& random) {
  check_tokens("glam::GLaM.loss", tokens);
  check_batch("glam::GLaM.loss", "targets", targets, torch::kLong, tokens.sizes());
  const bool wide = embedding_->weight.scalar_type() == torch::kDouble;
  if (weights) {
    check_batch("glam::GLaM.loss", "weights", *weights, wide ? torch::kDouble : torch::kFloat, tokens.sizes());
  }
  const Hidden hidden = hidden_states(tokens, segment_ids, random);
  std::optional<Tensor> weights_T;
  if (weights) weights_T = weights->flatten();
  const auto [loss_sum, nll_T, lse_T] =
      linear_cross_entropy(hidden.h_BSD.flatten(0, 1), output_table(), targets.flatten(), weights_T,
                           std::pow(static_cast<double>(config_.model_dim), -0.5), config_.z_loss,
                           config_.label_smoothing, config_.logit_cap);
  const Tensor num_tokens = weights       ? (*weights != 0).sum()
                            : segment_ids ? (*segment_ids != 0).sum()
                                          : torch::full({}, tokens.numel(), tokens.options());
  Loss loss{loss_sum,
            torch::zeros_like(loss_sum),
            torch::zeros_like(loss_sum),
            nll_T.view(targets.sizes()),
            num_tokens,
            torch::zeros({0, config_.num_experts + 6}, tokens.options())};
  if (hidden.aux.empty()) return loss;
  loss.aux = torch::stack(hidden.aux).sum();
  if (config_.aux_loss_reduction == "mean") loss.aux = loss.aux / static_cast<double>(hidden.aux.size());
  loss.router_z = torch::stack(hidden.router_z).sum();
  loss.router_statistics = torch::stack(hidden.statistics);
  return loss;
}

std::vector<Tensor> GLaMImpl::init_cache(int64_t batch, int64_t max_len) const {
  const Tensor& table = embedding_->weight;
  const auto dtype = to_compute_dtype(torch::empty({0}, table.options()), config_.compute_dtype).scalar_type();
  std::vector<Tensor> cache;
  for (int64_t i = 0; i < 2 * config_.num_layers; ++i) {
    cache.push_back(torch::zeros({batch, max_len, config_.num_heads, config_.head_dim}, table.options().dtype(dtype)));
  }
  return cache;
}

Tensor GLaMImpl::step(const Tensor& tokens, const std::vector<Tensor>& cache, const Tensor& positions,
                      const Tensor& lengths) {
  TORCH_CHECK(static_cast<int64_t>(cache.size()) == 2 * config_.num_layers, "glam::GLaM.step: expected a cache of ",
              2 * config_.num_layers, " tensors (init_cache makes one), got ", cache.size());
  check_tokens("glam::GLaM.step", tokens);
  check_batch("glam::GLaM.step", "positions", positions, torch::kInt, {tokens.size(0)});
  check_batch("glam::GLaM.step", "lengths", lengths, torch::kInt, {tokens.size(0)});
  Tensor x_BND = embed(tokens);
  const Tensor new_N = torch::arange(tokens.size(1), torch::device(tokens.device()));
  const Tensor token_mask = ((new_N < lengths.unsqueeze(1)) & (positions >= 0).unsqueeze(1)).flatten();
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    x_BND = layers_->at<BlockImpl>(layer).step(x_BND, cache[2 * layer], cache[2 * layer + 1], positions, token_mask);
  }
  const Tensor last = (lengths.to(torch::kLong) - 1).clamp_min(0).view({-1, 1, 1}).expand({-1, 1, config_.model_dim});
  return output_logits(final_norm_(x_BND.gather(1, last).squeeze(1)));
}

}  // namespace glam::nn
