// glam::nn::GLaM: the model as a LibTorch module tree, for programs with and without Python.
//
// Letters: B sequences, S positions, N new positions, D model dim, F hidden dim, H heads, A head dim, E experts,
// V vocabulary. Parameters are float32 (or what .to() makes of them) and named as in the checkpoint folder:
//   embedding.weight [V, D]; layers.N.attention.{q,k,v} [D, H*A], .o [H*A, D], .relative_bias [H, 32];
//   layers.N.{attention_norm,ffn_norm}.scale [D]; layers.N.moe.router [D, E], .wi [E, D, F], .wo [E, F, D], .wg [E, D, F]
//   (geglu experts only); layers.N.ffn.{w0,w1} [D, F], .wo [F, D]; final_norm.scale [D]; output.weight [V, D] if untied.
// The computation is that of glam_ext/functional.py, bit for bit. Sources: GLaM (arXiv 2112.06905) section 3;
// google/praxis glam.py and tensorflow/lingvo gshard_builder.py.
#pragma once

#include <glam/config.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <optional>
#include <string>
#include <vector>

namespace glam::nn {

using torch::Tensor;

// Counters of the random routing policies: the numbers depend on these and the layer, not on ranks or micro-batches.
struct Randomness {
  int64_t seed = 0;
  int64_t step = 0;
  int64_t first_token = 0;  // index of the first token of this call in the global batch
};

// Experts spread over the ranks of a process group: rank p of P holds experts [p E / P, (p + 1) E / P) of every MoE layer,
// and wi, wo and wg have E / P of them. The group is named, as torch.distributed or c10d::register_process_group
// registered it; "" is one process with all experts. All ranks of the group must make every call.
struct ExpertParallel {
  std::string group;
  int64_t chunks = 1;  // of a rank's experts: one is computed while others travel (exchange_mlp)
};

// Sums over the tokens of one call. The trainer divides by the global number of real tokens.
struct Loss {
  Tensor loss_sum;           // [], float32: weighted negative log-likelihood with z-loss
  Tensor aux;                // [], load-balance loss, mean over groups, summed (or averaged) over the MoE layers
  Tensor router_z;           // [], sum of logsumexp(router logits)^2 over real tokens and layers
  Tensor nll;                // [B, S], unweighted
  Tensor num_tokens;         // int64 [], real tokens: those of non-zero weight, or else outside the padding
  Tensor router_statistics;  // int64 [MoE layers, E + 6]; see glam::router_statistics
};

struct NormImpl : torch::nn::Module {
  NormImpl(const GLaMConfig& config, torch::Device device);
  Tensor forward(const Tensor& x);  // [..., D], in x's dtype
  Tensor scale;
  double eps;
};
TORCH_MODULE(Norm);

struct EmbeddingImpl : torch::nn::Module {
  EmbeddingImpl(const GLaMConfig& config, torch::Device device);
  Tensor weight;
};
TORCH_MODULE(Embedding);

struct AttentionImpl : torch::nn::Module {
  AttentionImpl(const GLaMConfig& config, torch::Device device);
  Tensor forward(const Tensor& h_BSD, const std::optional<Tensor>& segment_ids);
  // Appends to the caches [B, max_len, H, A] in place.
  Tensor step(const Tensor& h_BND, Tensor k_cache, Tensor v_cache, const Tensor& positions);
  Tensor q, k, v, o, relative_bias;

 private:
  Tensor heads(const Tensor& h, const Tensor& weight) const;
  int64_t num_heads_, head_dim_;
  bool extra_logit_;
  double logit_cap_;
};
TORCH_MODULE(Attention);

struct FeedForwardImpl : torch::nn::Module {
  FeedForwardImpl(const GLaMConfig& config, torch::Device device);
  Tensor forward(const Tensor& h_BSD);
  Tensor w0, w1, wo;
};
TORCH_MODULE(FeedForward);

struct MoEOutput {
  Tensor y_BSD, aux, router_z, statistics;
};

struct MoEImpl : torch::nn::Module {
  MoEImpl(const GLaMConfig& config, int64_t layer, torch::Device device, const ExpertParallel& parallel);
  // token_mask: bool [B * S], true for real tokens. training: its capacity, its policy for second choices, jitter.
  MoEOutput forward(const Tensor& h_BSD, const std::optional<Tensor>& token_mask, bool training,
                    const Randomness& random);
  Tensor infer(const Tensor& h_BSD, const std::optional<Tensor>& token_mask);  // y_BSD alone
  Tensor router, wi, wo, wg;

 private:
  struct Routed {
    Tensor y_BSD, z_TE, aux_G, expert_ids, positions;
  };
  Routed routed(const Tensor& h_BSD, const std::optional<Tensor>& token_mask, bool training, const Randomness& random);
  Tensor router_logits(const Tensor& h_TD, bool training, const Randomness& random) const;
  std::optional<Tensor> noise(const Tensor& z_TE, bool training, const Randomness& random) const;
  // moe_mlp with the experts of all ranks of the group.
  Tensor exchanged_experts(const Tensor& h_TD, const Tensor& gates, const Tensor& expert_ids, const Tensor& positions,
                           int64_t group_size, int64_t slots) const;
  Tensor expert_place(const Tensor& expert_ids) const;
  std::optional<Tensor> gate_weight() const;
  GLaMConfig config_;
  ExpertParallel parallel_;
  int64_t num_ranks_;
  int64_t layer_;
};
TORCH_MODULE(MoE);

struct BlockOutput {
  Tensor x_BSD;
  Tensor aux, router_z, statistics;  // undefined in a dense layer
};

struct BlockImpl : torch::nn::Module {
  BlockImpl(const GLaMConfig& config, int64_t layer, torch::Device device, const ExpertParallel& parallel);
  BlockOutput forward(const Tensor& x_BSD, const std::optional<Tensor>& segment_ids,
                      const std::optional<Tensor>& token_mask, bool training, const Randomness& random);
  Tensor step(const Tensor& x_BND, Tensor k_cache, Tensor v_cache, const Tensor& positions, const Tensor& token_mask);

  Norm attention_norm{nullptr}, ffn_norm{nullptr};
  Attention attention{nullptr};
  MoE moe{nullptr};  // one of these two
  FeedForward ffn{nullptr};
};
TORCH_MODULE(Block);

class GLaMImpl : public torch::nn::Module {
 public:
  // Initialised from (seed, parameter name, expert id) alone, so that every layout and language starts from the same
  // numbers; on the meta device nothing is allocated. Throws std::invalid_argument for an impossible configuration.
  // Without a seed the values are left for the caller to fill. Throws c10::Error where E is no multiple of the ranks, or
  // a rank's experts none of the chunks.
  explicit GLaMImpl(const GLaMConfig& config, std::optional<int64_t> seed = 0, torch::Device device = torch::kCPU,
                    const ExpertParallel& parallel = {});

  const GLaMConfig& config() const { return config_; }
  const ExpertParallel& parallel() const { return parallel_; }
  // Of each MoE layer: the experts whose weights are here, [first, first + count).
  int64_t first_local_expert() const { return first_local_expert_; }
  int64_t num_local_experts() const { return num_local_experts_; }
  // The weights of experts by name, [local experts, ...]; all other parameters are whole on every rank.
  torch::OrderedDict<std::string, Tensor> expert_parameters() const;

  // tokens int64 [B, S]; segment_ids int32 [B, S], 0 = padding. -> logits float32 [B, S, V].
  Tensor forward(const Tensor& tokens, const std::optional<Tensor>& segment_ids = std::nullopt,
                 const Randomness& random = {});
  // targets int64 [B, S]; weights float32 [B, S], 0 for padding.
  Loss loss(const Tensor& tokens, const Tensor& targets, const std::optional<Tensor>& weights = std::nullopt,
            const std::optional<Tensor>& segment_ids = std::nullopt, const Randomness& random = {});

  // Packs the weights of all products and the embedding in bfloat16 or int8 (glam::pack_weight), one after the other, and
  // frees the plain ones; router, norms and biases stay. Parameters keep their names, the packed ones have the packed
  // shapes, none wants a gradient. The model is then for inference: forward, loss without gradients, step; in eval mode.
  // A vocabulary that is no multiple of 32 leaves the table in plain bfloat16. Throws c10::Error, and changes nothing,
  // unless model_dim, hidden_dim and num_heads * head_dim are multiples of 32 and all parameters are here, on the CPU, in
  // float32 or bfloat16.
  void prepare_for_inference(torch::ScalarType dtype);
  bool is_prepared() const;

  // Zeroed keys and values of each layer in turn, [batch, max_len, H, A] in the compute dtype.
  std::vector<Tensor> init_cache(int64_t batch, int64_t max_len) const;
  // Appends N tokens per row: tokens int64 [B, N]; positions int32 [B], index of the first new token, -1 for a finished
  // row; lengths int32 [B], how many of the N are real (the rest is padding on the right). -> logits float32 [B, V]
  // after each row's last real token. The caches are written in place. Inference whatever the mode, so several threads
  // may step (each with its cache) while another one trains.
  Tensor step(const Tensor& tokens, const std::vector<Tensor>& cache, const Tensor& positions, const Tensor& lengths);

 private:
  struct Hidden {
    Tensor h_BSD;
    std::vector<Tensor> aux, router_z, statistics;
  };
  Tensor embed(const Tensor& tokens) const;
  const Tensor& output_table() const;
  Tensor output_logits(const Tensor& h) const;
  Hidden hidden_states(const Tensor& tokens, const std::optional<Tensor>& segment_ids, const Randomness& random);

  void check_equal_batches(const Tensor& tokens) const;

  GLaMConfig config_;
  ExpertParallel parallel_;
  int64_t first_local_expert_ = 0, num_local_experts_ = 0;
  Embedding embedding_{nullptr};
  torch::nn::ModuleList layers_{nullptr};
  Norm final_norm_{nullptr};
  Embedding output_{nullptr};
};
TORCH_MODULE(GLaM);

// Fills every parameter of a model as its configuration says; parameters on the meta device are left alone.
void initialize(GLaMImpl& model, int64_t seed);

}  // namespace glam::nn
